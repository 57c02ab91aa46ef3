"""Rotation and writes to a paged cache in Triton: queries, keys and values in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator, tensor_bytes
from ..dispatch import log_launch
from ..rope.triton import FLOPS, OPTIONS, TILE, rotate

# Legend
#   T, G, M, D  rows, groups, heads of a group (its queries, key and value), elements of a head; Q = M - 2 queries
#   B, K        blocks, tokens of a block (block_size)
#   HALF        D / 2; HALF_BLOCK the next power of two
# A program has one head of TOKENS rows. Within a block of a cache all is contiguous. Offsets into a cache are int64.


@triton.jit
def rope_write_kv_kernel(
    qkv_ptr,
    out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    tokens,
    queries,
    half,
    block_size,
    capacity,
    stride_t,
    stride_g,
    stride_m,
    out_stride_t,
    out_stride_g,
    out_stride_h,
    key_stride_b,
    value_stride_b,
    TOKENS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """Rotate one query of TOKENS rows, or write their keys or values to the rows' slots."""
    # 1. The rows, and the head.
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    t = row[:, None]
    group, head = tl.program_id(1) // (queries + 2), tl.program_id(1) % (queries + 2)
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (t < tokens) & (column < half)
    source = qkv_ptr + t * stride_t + group * stride_g + head * stride_m + column
    # 2. Where a key or a value goes. A slot of padding gets no address of its own.
    slot = tl.load(slots_ptr + row, mask=row < tokens, other=-1).to(tl.int64)[:, None]
    written = (slot >= 0) & (slot < capacity) & inside
    slot = tl.where((slot >= 0) & (slot < capacity), slot, 0)
    block = slot // block_size
    within = (group * block_size + slot % block_size) * 2 * half + column
    # 3. A value, a key, or a query.
    if head == queries + 1:
        to = value_cache_ptr + block * value_stride_b + within
        tl.store(to, tl.load(source, mask=written), mask=written)
        tl.store(to + half, tl.load(source + half, mask=written), mask=written)
    else:
        cos = tl.load(cos_ptr + t * half + column, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + t * half + column, mask=inside, other=0.0)
        if head == queries:
            rotate(source, key_cache_ptr + block * key_stride_b + within, cos, sin, written, half)
        else:
            to = out_ptr + t * out_stride_t + group * out_stride_g + head * out_stride_h + column
            rotate(source, to, cos, sin, inside, half)


def _cost(
    qkv: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    out: Tensor,
) -> Cost:
    # Every key and value is written: slots of padding are not known to the host.
    values = qkv.shape[0] * qkv.shape[1] * qkv.shape[3]
    reads = sum(map(tensor_bytes, (qkv, cos_TR, sin_TR, slots)))
    return Cost(1, FLOPS * (qkv.numel() - values), reads, tensor_bytes(qkv))


@device_operator(
    "rope_write_kv(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, "
    "Tensor(c!) out)",
    _cost,
)
def _operator(
    qkv: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    out: Tensor,
) -> None:
    tokens, groups, heads, width = qkv.shape
    blocks, _, block_size, _ = key_cache.shape
    block = triton.next_power_of_2(width // 2)
    rows = max(1, TILE // block)
    with torch.cuda.device_of(qkv):
        log_launch("rope_write_kv", "triton")
        rope_write_kv_kernel[(triton.cdiv(tokens, rows), groups * heads)](
            qkv,
            out,
            key_cache,
            value_cache,
            cos_TR,
            sin_TR,
            slots,
            tokens,
            heads - 2,
            width // 2,
            block_size,
            blocks * block_size,
            *qkv.stride()[:3],
            *out.stride()[:3],
            key_cache.stride(0),
            value_cache.stride(0),
            TOKENS=rows,
            HALF_BLOCK=block,
            **OPTIONS,
        )


def rope_write_kv(
    qkv_TGMD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    key_cache_BGKD: Tensor,
    value_cache_BGKD: Tensor,
    cache_slots_T: Tensor,
    out_TGQD: Tensor,
) -> None:
    """Write rotated queries to `out`, keys and values to their slots; see the public function."""
    _operator(qkv_TGMD, cos_TR, sin_TR, key_cache_BGKD, value_cache_BGKD, cache_slots_T, out_TGQD)
