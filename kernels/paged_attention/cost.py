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
    parts_size = 0 if parts is None else _parts_bytes(parts, max_length, window)
    writes = tensor_bytes(out) + parts_size
    # Two products, and for every score a scale, two comparisons of the maximum, a difference, a power and a sum.
    return Cost(1, q.shape[0] * q.shape[1] * seen * (4 * width + 6), reads, writes)


def merge_cost(parts: Tensor, sums: Tensor, lengths: Tensor, out: Tensor, max_length: int, window: int) -> Cost:
    """Return the cost of the launch that merges splits."""
    bytes_read = _parts_bytes(parts, max_length, window)
    # A product and a fused one for every element, beside the maximum and the powers of a part.
    return Cost(1, bytes_read // 4 * 3, bytes_read + tensor_bytes(lengths), tensor_bytes(out))


def _parts_bytes(parts: Tensor, max_length: int, window: int) -> int:
    """Return the bytes of the parts, with two numbers each, that a row of max_length tokens has."""
    rows, heads, _, width = parts.shape
    splits = -(-max_length // SPLIT) - max(0, max_length - window) // SPLIT * (window > 0)
    return rows * heads * splits * (width + 2) * parts.element_size()
