"""Attention of rows over the pages of their sequences: decode steps and chunks of prompts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import validate
from ..dispatch import select
from ..paged_kv.interface import check_caches, check_dtype, check_int32
from .inputs import Pages, Rows

# Legend: T, rows; N, query heads; G, key/value heads; D, elements of a head; B, blocks; K, tokens of a block; S,
# sequences; W, blocks of the longest sequence.


def paged_attention(
    q_TND: Tensor,
    key_cache_BGKD: Tensor,
    value_cache_BGKD: Tensor,
    block_tables: Tensor,
    lengths_S: Tensor,
    *,
    row_starts: Tensor | None = None,
    table_rows_S: Tensor | None = None,
    max_length: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the attention of rows over the cached tokens of their sequences.

        out = sum over tokens t of p[t] value[t],   p = softmax(scale * query . key[t]),   t < length
        lse = log(exp(lse_1) + exp(lse_2)),   out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)

    Source: Vaswani et al. 2017 (arXiv:1706.03762) for the first line; Milakov and Gimelshein 2018 (arXiv:1805.02867)
    for the second, by which parts of 256 tokens are merged, in order. Parts begin at multiples of 256, so the result of
    a row depends on that row and its tokens alone, to the bit: neither on other rows nor on block numbers.

    A row that sequence s has at index i attends to lengths[s] - (rows of s - 1 - i) tokens. Their keys and values,
    the row's own included, are in the cache already.

    Args:
        q_TND: [T, N, D] floating, rotated queries; N is a multiple of G. Views of heads are read in place.
        key_cache_BGKD: [B, G, K, D], dtype of q_TND. Blocks may lie apart; each is contiguous.
        value_cache_BGKD: like key_cache_BGKD.
        block_tables: [>= S, W] int32, blocks of each sequence in order. Entries behind its length may be anything.
        lengths_S: [S] int32, tokens that the last row of each sequence attends to; 0 is padding, with a result of 0.
        row_starts: [S + 1] int32: sequence s has rows row_starts[s] to row_starts[s + 1] of q_TND. Other rows are
            neither read nor written. None: every sequence has one row, S = T.
        table_rows_S: [S] int32, row of block_tables of each sequence; None: row s.
        max_length: Integer that no length exceeds; the launch depends on it and not on lengths. Default: W * K. A
            larger length is an error on CPUs; on a device the result of its rows is NaN.
        window: Tokens that a row attends to, its own included; None: all.
        scale: Factor of the products; default: 1 / sqrt(D).
        out: [T, N, D], dtype of q_TND, heads contiguous, written in place; None: it is allocated.

    Returns:
        [T, N, D] in the dtype of q_TND; `out` if it was passed. There is no gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device, stride, range or block is wrong, or a gradient is asked for.
    """
    op = "paged_attention"
    if out is not None and max_length is not None and validate.is_unchecked():
        pages = Pages(key_cache_BGKD, value_cache_BGKD, block_tables, table_rows_S)
        rows = Rows(lengths_S, row_starts, max_length, window or 0)
        select(op, q_TND)(q_TND, pages, rows, scale or 1.0 / math.sqrt(q_TND.shape[2]), out)
        return out
    # 1. The cache, and queries that fit it.
    check_caches(op, key_cache_BGKD, value_cache_BGKD)
    _, groups, block_size, width = key_cache_BGKD.shape
    validate.check_floating(op, "q_TND", q_TND, (None, None, width), key_cache_BGKD)
    check_dtype(op, "q_TND", q_TND, key_cache_BGKD.dtype, "the cache")
    if groups == 0 or block_size == 0 or q_TND.shape[1] % groups:
        raise ValueError(f"{op}: the {q_TND.shape[1]} heads of q_TND must be a multiple of the cache's {groups}")
    if q_TND.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: there is no gradient; call it under torch.no_grad()")
    # 2. Tables and lengths.
    check_int32(op, "lengths_S", lengths_S, (q_TND.shape[0] if row_starts is None else None,), q_TND)
    sequences = lengths_S.shape[0]
    check_int32(op, "block_tables", block_tables, (None, None), q_TND)
    if table_rows_S is not None:
        check_int32(op, "table_rows_S", table_rows_S, (sequences,), q_TND)
    elif block_tables.shape[0] < sequences:
        raise ValueError(f"{op}: block_tables must have a row for each of {sequences} sequences")
    if row_starts is not None:
        check_int32(op, "row_starts", row_starts, (sequences + 1,), q_TND)
    # 3. Numbers.
    capacity = block_tables.shape[1] * block_size
    max_length = capacity if max_length is None else max_length
    validate.check_plain_number(op, "max_length", max_length, low=0, high=capacity)
    if window is not None:
        validate.check_plain_number(op, "window", window, low=1)
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    validate.check_plain_number(op, "scale", scale)
    # 4. Memory.
    if out is None:
        out = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    else:
        validate.check_floating(op, "out", out, tuple(q_TND.shape), q_TND)
        check_dtype(op, "out", out, q_TND.dtype, "q_TND")
        if out.stride(-1) != 1:
            raise ValueError(f"{op}: heads of out must be contiguous, got strides {out.stride()}")
    if out.numel() and sequences:
        q_TND = q_TND.detach()
        pages = Pages(
            key_cache_BGKD,
            value_cache_BGKD,
            block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous(),
            None if table_rows_S is None else table_rows_S.contiguous(),
        )
        starts = None if row_starts is None else row_starts.contiguous()
        rows = Rows(lengths_S.contiguous(), starts, int(max_length), 0 if window is None else int(window))
        run = select(op, q_TND)
        run(q_TND if q_TND.stride(-1) == 1 else q_TND.contiguous(), pages, rows, float(scale), out)
    return out
