"""rope and rope_qkv, forward and backward: ours, the reference, rotate_half as models form it, torch.compile."""

import torch

from bench.kernels.trunk_rows import Piece, run
from icegrt.kernels import rope, rope_qkv

HEAD, QUERIES = 64, 4  # elements of a head, queries of a group


def eager(q, k, cos, sin):
    cos, sin = (torch.cat([x, x], dim=-1)[:, None].to(q.dtype) for x in (cos, sin))

    def turn(x):
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin

    return turn(q), turn(k)


def eager_qkv(qkv, cos, sin):
    q, k, v = qkv.split([QUERIES, 1, 1], dim=2)
    return *eager(q.reshape(q.shape[0], -1, HEAD), k.squeeze(2), cos, sin), v.squeeze(2)


def tables(rows):
    angles = torch.arange(rows)[:, None] * 10_000.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    return [angles.cos(), angles.sin()]


def draw(rows, hidden):
    groups = hidden // HEAD // QUERIES
    return [torch.randn(rows, QUERIES * groups, HEAD), torch.randn(rows, groups, HEAD), *tables(rows)]


def draw_qkv(rows, hidden):
    return [torch.randn(rows, hidden // HEAD // QUERIES, QUERIES + 2, HEAD), *tables(rows)]


PIECES = [Piece("rope", rope, eager, draw), Piece("rope_qkv", rope_qkv, eager_qkv, draw_qkv)]

if __name__ == "__main__":
    run(__doc__, "rope", PIECES)
