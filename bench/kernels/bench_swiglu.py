"""swiglu, forward and backward: ours, the reference, silu and a product, torch.compile."""

import torch
from torch.nn.functional import silu

from bench.kernels.trunk_rows import Piece, run
from icegrt.kernels import swiglu


def eager(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def draw(rows, hidden):
    return [torch.randn(rows, 1, 2 * (8 * hidden // 3))]


PIECES = [Piece("swiglu", swiglu, eager, draw)]

if __name__ == "__main__":
    run(__doc__, "swiglu", PIECES)
