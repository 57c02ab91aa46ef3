"""rms_norm and add_rms_norm, forward and backward: ours, the reference, torch's own norm, torch.compile."""

import torch
from torch.nn.functional import rms_norm as torch_norm

from bench.kernels.trunk_rows import Piece, run
from icegrt.kernels import add_rms_norm, rms_norm


def eager(x, weight):
    return torch_norm(x, (x.shape[-1],), weight, 1e-5)


def eager_sum(x, residual, weight):
    total = x + residual
    return eager(total, weight), total


def draw(copies):
    return lambda rows, hidden: [*torch.randn(copies, rows, 1, hidden).unbind(), 1 + 0.1 * torch.randn(hidden)]


PIECES = [Piece("rms_norm", rms_norm, eager, draw(1)), Piece("add_rms_norm", add_rms_norm, eager_sum, draw(2))]

if __name__ == "__main__":
    run(__doc__, "rms_norm", PIECES)
