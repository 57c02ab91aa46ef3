"""The declared costs of the launches of paged attention.

Lengths are on the device: a cost is that of sequences of `max_length` tokens, whose blocks are their own.
"""

from __future__ import annotations

from torch import Tensor

from ..common.operators import Cost, tensor_bytes
from .inputs import SPLIT


def _attended(q: Tensor, lengths: Tensor, max_length: int, window: int) -> tuple[int, int]:
    """Return (tokens that a sequence's rows read, tokens that a row sees), at the most."""
    seen = min(max_length, window) if window else max_length
    return min(max_length, seen + q.shape[0] - lengths.shape[0]), seen


def attention_cost(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    table_rows: Tensor | None,
    row_starts: Tensor | None,
    out: Tensor | None,
    parts: Tensor | None,
    sums: Tensor | None,
    max_length: int,
    window: int,
    scale: float,
) -> Cost:
    """Return the cost of the launch over all splits."""
    sequences = lengths.shape[0]
    _, groups, block_size, width = key_cache.shape
    read, seen = _attended(q, lengths, max_length, window)
    entries = -(-max_length // block_size) - (max_length - read) // block_size
    cached = 2 * sequences * read * groups * width * key_cache.element_size()
    reads = sum(map(tensor_bytes, (q, lengths, table_rows, row_starts))) + cached + sequences * entries * 4
    writes = sum(map(tensor_bytes, (out, parts, sums)))
    # Two products, and for every score a scale, two comparisons of the maximum, a difference, a power and a sum.
    return Cost(1, q.shape[0] * q.shape[1] * seen * (4 * width + 6), reads, writes)


def merge_cost(parts: Tensor, sums: Tensor, lengths: Tensor, out: Tensor, max_length: int, window: int) -> Cost:
    """Return the cost of the launch that merges splits."""
    rows, heads, splits, width = parts.shape
    seen = splits - (max_length - window) // SPLIT if 0 < window < max_length else splits
    reads = rows * heads * seen * (width + 2) * 4 + tensor_bytes(lengths)
    return Cost(1, rows * heads * seen * (3 * width + 8), reads, tensor_bytes(out))
