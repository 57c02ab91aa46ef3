"""Paged attention in Triton: programs by row tile, key/value head and split; a second launch merges splits in order.

A split is SPLIT tokens, wherever a sequence ends. If no length exceeds one split, and for chunks of prompts, one
program takes all splits of its rows and merges them in the same order with the same arithmetic: FMA contraction is off,
so that both launches round alike.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import device_operator
from ..dispatch import log_launch
from .cost import attention_cost, merge_cost
from .inputs import SPLIT, Pages, Rows

# Legend
#   T, N, G, D  rows, query heads, key/value heads, elements of a head (WIDTH; BLOCK is the next power of two)
#   GROUP       queries of a key/value head, N / G
#   K           tokens of a block (PAGE)
#   pair        a row and one query of the group: ROWS * GROUP of the PAIRS lines of a tile are in use
#   peak, total, acc  of a pair: the maximum of its scores (base 2), the sum of their exponentials, weighted values
# Within a block of a cache all is contiguous. Its strides are in rows of D elements: the compiler then knows that
# offsets are multiples of D, and loads whole vectors. Offsets into a cache, and of rows, are int64.

LOG2_E = 1.4426950408889634
PAIRS_OF_CHUNKS = 64  # a half for heads of more than 128 elements
OPTIONS = {"enable_fp_fusion": False}
MERGE_OPTIONS = {"num_warps": 4, **OPTIONS}
MERGE_TILE = 2048  # elements of the queries that a program merges


@triton.jit
def merge(peak, total, acc, next_peak, next_total, next_acc):
    """Return the merge of two parts. A part without tokens (a peak of -inf) changes no bit of the other."""
    top = tl.maximum(peak, next_peak)
    finite = tl.where(top == -float("inf"), 0.0, top)
    keep, add = tl.exp2(peak - finite), tl.exp2(next_peak - finite)
    return top, total * keep + next_total * add, acc * keep[:, None] + next_acc * add[:, None]


@triton.jit
def attend_split(
    q,
    key_ptr,
    value_ptr,
    table_ptr,
    first,
    last,
    starts,
    ends,
    group,
    key_stride_b,
    value_stride_b,
    scale,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return (peak, total, acc) of a tile over the tokens [first, last); pair i sees those of [starts[i], ends[i])."""
    column = tl.arange(0, BLOCK)
    peak = tl.full((PAIRS,), -float("inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    acc = tl.zeros((PAIRS, BLOCK), tl.float32)
    for token in range(first // TOKENS * TOKENS, last, TOKENS):
        # 1. Where the tokens are.
        position = token + tl.arange(0, TOKENS)
        inside = (position >= first) & (position < last)
        block = tl.load(table_ptr + position // PAGE, mask=inside, other=0).to(tl.int64)
        offset = group * PAGE + position % PAGE
        moved = inside[:, None] & (column < WIDTH)[None, :]
        key = tl.load(
            key_ptr + ((block * key_stride_b + offset) * WIDTH)[:, None] + column[None, :], mask=moved, other=0.0
        )
        # 2. Scores in base 2.
        if WIDE:
            key = key.to(tl.float32)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        visible = (position[None, :] >= starts[:, None]) & (position[None, :] < ends[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        # 3. The running softmax.
        top = tl.maximum(peak, tl.max(scores, axis=1))
        finite = tl.where(top == -float("inf"), 0.0, top)
        keep = tl.exp2(peak - finite)
        probs = tl.exp2(scores - finite[:, None])
        total = total * keep + tl.sum(probs, axis=1)
        # 4. The weighted values.
        value = tl.load(
            value_ptr + ((block * value_stride_b + offset) * WIDTH)[:, None] + column[None, :], mask=moved, other=0.0
        )
        if WIDE:
            value = value.to(tl.float32)
        acc = tl.dot(probs.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
        peak = top
    return peak, total, acc


@triton.jit
def paged_attention_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    tables_ptr,
    lengths_ptr,
    table_rows_ptr,
    row_starts_ptr,
    out_ptr,
    parts_ptr,
    sums_ptr,
    sequences,
    max_length,
    window,
    scale,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    key_stride_b,
    value_stride_b,
    table_stride,
    CHUNKS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attend with a tile of rows of one sequence. SPLITS: one split, to parts; 0: all splits, to out."""
    ROWS: tl.constexpr = PAIRS // GROUP
    tile, group = tl.program_id(0), tl.program_id(1)
    # 1. The sequence, and its rows from `row` to `rows_end`. A sequence has one tile more than it may need.
    if CHUNKS:
        origin = tl.load(row_starts_ptr)
        sequence, above = tl.full((), 0, tl.int32), sequences
        while above - sequence > 1:
            middle = (sequence + above) // 2
            if (tl.load(row_starts_ptr + middle) - origin) // ROWS + middle <= tile:
                sequence = middle
            else:
                above = middle
        begin = tl.load(row_starts_ptr + sequence)
        rows_end = tl.load(row_starts_ptr + sequence + 1)
        row = begin + (tile - (begin - origin) // ROWS - sequence) * ROWS
    else:
        sequence, row, rows_end = tile, tile, tile + 1
    if row >= rows_end:
        return
    # 2. The tokens that each pair sees, and those that any pair sees.
    length = tl.load(lengths_ptr + sequence)
    pair = tl.arange(0, PAIRS)
    pair_row, pair_head = row + pair // GROUP, group * GROUP + pair % GROUP
    used = (pair < ROWS * GROUP) & (pair_row < rows_end)
    ends = length - (rows_end - 1 - pair_row)
    known = ends <= max_length
    ends = tl.minimum(ends, max_length)
    starts = tl.where(window > 0, tl.maximum(ends - window, 0), 0)
    lowest = tl.min(tl.where(used, starts, max_length), axis=0)
    highest = tl.max(tl.where(used, ends, 0), axis=0)
    # 3. The queries.
    column = tl.arange(0, BLOCK)
    moved = used[:, None] & (column < WIDTH)[None, :]
    q_offset = pair_row.to(tl.int64) * q_stride_t + pair_head * q_stride_h
    q = tl.load(q_ptr + q_offset[:, None] + column[None, :], mask=moved, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    table = sequence
    if TABLE_ROWS:
        table = tl.load(table_rows_ptr + sequence)
    table_ptr = tables_ptr + table.to(tl.int64) * table_stride
    # 4. One split, counted from the first that the row sees, or all in order.
    first_split, last_split = lowest // SPLIT, tl.cdiv(highest, SPLIT)
    if SPLITS > 0:
        first_split += tl.program_id(2)
        if first_split >= last_split:
            return
        last_split = first_split + 1
    peak = tl.full((PAIRS,), -float("inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    acc = tl.zeros((PAIRS, BLOCK), tl.float32)
    for index in range(first_split, last_split):
        next_peak, next_total, next_acc = attend_split(
            q,
            key_ptr,
            value_ptr,
            table_ptr,
            tl.maximum(index * SPLIT, lowest),
            tl.minimum(index * SPLIT + SPLIT, highest),
            starts,
            ends,
            group,
            key_stride_b,
            value_stride_b,
            scale,
            PAIRS,
            TOKENS,
            WIDTH,
            BLOCK,
            PAGE,
            WIDE,
        )
        peak, total, acc = merge(peak, total, acc, next_peak, next_total, next_acc)
    # 5. The part of the split, or the result.
    if SPLITS > 0:
        part = (pair_row.to(tl.int64) * tl.num_programs(1) * GROUP + pair_head) * SPLITS + tl.program_id(2)
        tl.store(parts_ptr + part[:, None] * WIDTH + column[None, :], acc, mask=moved)
        tl.store(sums_ptr + part * 2, peak, mask=used)
        tl.store(sums_ptr + part * 2 + 1, total, mask=used)
    else:
        out = tl.where((ends > 0)[:, None], acc / total[:, None], 0.0)
        out = tl.where(known[:, None], out, float("nan"))
        out_offset = pair_row.to(tl.int64) * out_stride_t + pair_head * out_stride_h
        tl.store(out_ptr + out_offset[:, None] + column[None, :], out, mask=moved)


@triton.jit
def merge_splits_kernel(
    parts_ptr,
    sums_ptr,
    lengths_ptr,
    out_ptr,
    max_length,
    window,
    out_stride_t,
    out_stride_h,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the splits of a row, for the queries of one key/value head."""
    row, group = tl.program_id(0), tl.program_id(1)
    # 1. The splits that the row sees.
    length = tl.load(lengths_ptr + row)
    end = tl.minimum(length, max_length)
    start = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    head = tl.arange(0, HEADS)
    used = head < GROUP
    column = tl.arange(0, BLOCK)
    moved = used[:, None] & (column < WIDTH)[None, :]
    part = (row.to(tl.int64) * tl.num_programs(1) * GROUP + group * GROUP + head) * SPLITS
    # 2. In order, from nothing.
    peak = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK), tl.float32)
    for split in range(0, tl.cdiv(end, SPLIT) - start // SPLIT):
        next_peak = tl.load(sums_ptr + (part + split) * 2, mask=used, other=0.0)
        next_total = tl.load(sums_ptr + (part + split) * 2 + 1, mask=used, other=1.0)
        next_acc = tl.load(parts_ptr + (part + split)[:, None] * WIDTH + column[None, :], mask=moved, other=0.0)
        peak, total, acc = merge(peak, total, acc, next_peak, next_total, next_acc)
    # 3. The result.
    out = tl.where(end > 0, acc / total[:, None], 0.0)
    out = tl.where(length <= max_length, out, float("nan"))
    out_offset = row.to(tl.int64) * out_stride_t + (group * GROUP + head) * out_stride_h
    tl.store(out_ptr + out_offset[:, None] + column[None, :], out, mask=moved)


def constants(heads: int, groups: int, width: int, dtype: torch.dtype, chunks: bool) -> dict[str, int | bool]:
    """Return the constants of paged_attention_kernel that the shapes of heads decide."""
    group, block = heads // groups, max(16, triton.next_power_of_2(width))
    # Triton's interpreter multiplies bf16 wrongly. It is asked here, because kernels are compiled per constant.
    wide = dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    # Triton 3.6 to 3.9 spill registers on sm_80, sm_90 or sm_100 with more pairs, tokens or stages, or fewer warps.
    tile = PAIRS_OF_CHUNKS if block <= 128 else PAIRS_OF_CHUNKS // 2
    pairs = max(16, triton.next_power_of_2(group), tile if chunks and not wide else 16)
    if wide:
        tokens = 16 if block <= 64 else 32
    else:
        tokens = 64 if block * pairs <= 16 * 128 else 32
    return {"GROUP": group, "PAIRS": pairs, "TOKENS": tokens, "BLOCK": block, "WIDE": wide}


def options(constants: dict[str, int | bool]) -> dict[str, int | bool]:
    """Return the launch options for constants of the kernel."""
    few = constants["BLOCK"] * constants["PAIRS"] <= 16 * (64 if constants["WIDE"] else 128)
    return {"num_warps": 4 if few else 8, "num_stages": 1 if constants["WIDE"] else 2, **OPTIONS}


@device_operator(
    "paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor tables, Tensor lengths, "
    "Tensor? table_rows, Tensor? row_starts, Tensor(a!)? out, Tensor(b!)? parts, Tensor(c!)? sums, int max_length, "
    "int window, float scale)",
    attention_cost,
)
def _attend(
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
) -> None:
    (rows, heads, width), sequences = q.shape, lengths.shape[0]
    _, groups, block_size, _ = key_cache.shape
    chosen = constants(heads, groups, width, q.dtype, row_starts is not None)
    tile_rows = chosen["PAIRS"] // chosen["GROUP"]
    # Rows of a sequence begin at any row: it has a tile more than its rows may need.
    tiles = sequences if row_starts is None else rows // tile_rows + sequences
    splits = 0 if parts is None else parts.shape[2]
    target = q if out is None else out  # never written if there are parts
    with torch.cuda.device_of(q):
        log_launch("paged_attention", "triton")
        paged_attention_kernel[(tiles, groups, max(1, splits))](
            q,
            key_cache,
            value_cache,
            tables,
            lengths,
            lengths if table_rows is None else table_rows,
            lengths if row_starts is None else row_starts,
            target,
            q if parts is None else parts,
            q if sums is None else sums,
            sequences,
            max_length,
            window,
            scale * LOG2_E,
            *q.stride()[:2],
            *target.stride()[:2],
            key_cache.stride(0) // width,
            value_cache.stride(0) // width,
            tables.stride(0),
            CHUNKS=row_starts is not None,
            TABLE_ROWS=table_rows is not None,
            SPLITS=splits,
            SPLIT=SPLIT,
            WIDTH=width,
            PAGE=block_size,
            **chosen,
            **options(chosen),
        )


@device_operator(
    "merge_splits(Tensor parts, Tensor sums, Tensor lengths, Tensor(a!) out, int max_length, int window)", merge_cost
)
def _merge(parts: Tensor, sums: Tensor, lengths: Tensor, out: Tensor, max_length: int, window: int) -> None:
    rows, heads, splits, width = parts.shape
    # The number of key/value heads is not that of the parts: the queries of a row are merged together.
    block = max(16, triton.next_power_of_2(width))
    group = max(1, min(heads, MERGE_TILE // block))
    while heads % group:
        group -= 1
    with torch.cuda.device_of(parts):
        log_launch("merge_splits", "triton")
        merge_splits_kernel[(rows, heads // group)](
            parts,
            sums,
            lengths,
            out,
            max_length,
            window,
            *out.stride()[:2],
            SPLITS=splits,
            GROUP=group,
            HEADS=triton.next_power_of_2(group),
            SPLIT=SPLIT,
            WIDTH=width,
            BLOCK=block,
            **MERGE_OPTIONS,
        )


def paged_attention(q_TND: Tensor, pages: Pages, rows: Rows, scale: float, out: Tensor) -> None:
    """Write the attention of rows; see the public function."""
    splits = triton.cdiv(rows.max_length, SPLIT)
    if rows.window:  # the tokens before the first whole split of a window, and that split and its successors
        splits = min(splits, 1 + triton.cdiv(rows.window - 1, SPLIT))
    arguments = (q_TND, pages.keys_BGKD, pages.values_BGKD, pages.tables, rows.lengths_S, pages.table_rows_S)
    if rows.starts is not None or splits <= 1:
        _attend(*arguments, rows.starts, out, None, None, rows.max_length, rows.window, scale)
        return
    shape = (*q_TND.shape[:2], splits)
    parts = torch.empty((*shape, q_TND.shape[2]), dtype=torch.float32, device=q_TND.device)
    sums = torch.empty((*shape, 2), dtype=torch.float32, device=q_TND.device)
    _attend(*arguments, None, None, parts, sums, rows.max_length, rows.window, scale)
    _merge(parts, sums, rows.lengths_S, out, rows.max_length, rows.window)
