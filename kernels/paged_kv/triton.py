"""Writes to a paged KV cache in Triton: one launch for keys and values, one for the copies of all parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator, tensor_bytes
from ..dispatch import log_launch

# Legend
#   T, G, D   rows, key/value heads, elements of a head (width)
#   B, K      blocks, tokens of a block (block_size)
#   P, C      parts of a cache, copies
# Within a block of a cache all is contiguous. Offsets into a cache are int64.

TILE = 2048  # elements that a program moves at a time
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def write_kv_kernel(
    k_ptr,
    v_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    rows,
    groups,
    width,
    block_size,
    capacity,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    key_stride_b,
    value_stride_b,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the keys, or the values, of one head of ROWS rows."""
    # 1. The rows' slots.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) % groups
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    written = (slot >= 0) & (slot < capacity)
    # 2. A slot of padding gets no address of its own.
    slot = tl.where(written, slot, 0)
    column = tl.arange(0, BLOCK)[None, :]
    moved = written[:, None] & (column < width)
    inside = ((group * block_size + slot % block_size) * width)[:, None] + column
    # 3. Programs of the first `groups` have keys, the others values.
    if tl.program_id(1) < groups:
        x = tl.load(k_ptr + (row * k_stride_t + group * k_stride_g)[:, None] + column, mask=moved)
        tl.store(key_cache_ptr + (slot // block_size * key_stride_b)[:, None] + inside, x, mask=moved)
    else:
        x = tl.load(v_ptr + (row * v_stride_t + group * v_stride_g)[:, None] + column, mask=moved)
        tl.store(value_cache_ptr + (slot // block_size * value_stride_b)[:, None] + inside, x, mask=moved)


@triton.jit
def copied_size(source, target, blocks, size):
    """Return the elements that a copy moves: none if one of its blocks does not exist."""
    return tl.where((source >= 0) & (source < blocks) & (target >= 0) & (target < blocks), size, 0)


@triton.jit
def copy_blocks_kernel(
    cache_ptr,
    from_ptr,
    to_ptr,
    staging_ptr,
    copies,
    blocks,
    size,
    cache_stride_p,
    cache_stride_b,
    BLOCK: tl.constexpr,
):
    """Copy BLOCK elements of every copied block of a part: all are read before the first is written."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cache = cache_ptr + tl.program_id(1).to(tl.int64) * cache_stride_p + column
    staging = staging_ptr + tl.program_id(1).to(tl.int64) * copies * size + column
    for copy in range(copies):
        source, target = tl.load(from_ptr + copy).to(tl.int64), tl.load(to_ptr + copy)
        copied = column < copied_size(source, target, blocks, size)
        x = tl.load(cache + source * cache_stride_b, mask=copied)
        tl.store(staging + tl.cast(copy, tl.int64) * size, x, mask=copied)
    tl.debug_barrier()  # another thread may write what this one read
    for copy in range(copies):
        source, target = tl.load(from_ptr + copy), tl.load(to_ptr + copy).to(tl.int64)
        copied = column < copied_size(source, target, blocks, size)
        x = tl.load(staging + tl.cast(copy, tl.int64) * size, mask=copied)
        tl.store(cache + target * cache_stride_b, x, mask=copied)


def _write_cost(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Cost:
    # A number for every address: a row of the cache is elsewhere than the row.
    return Cost(1, k.numel() + v.numel(), sum(map(tensor_bytes, (k, v, slots))), tensor_bytes(k) + tensor_bytes(v))


@device_operator(
    "write_kv(Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots)", _write_cost
)
def _write_operator(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    rows, groups, width = k.shape
    blocks, _, block_size, _ = key_cache.shape
    block = triton.next_power_of_2(width)
    tile = max(1, TILE // block)
    with torch.cuda.device_of(k):
        log_launch("write_kv", "triton")
        write_kv_kernel[(triton.cdiv(rows, tile), 2 * groups)](
            k,
            v,
            key_cache,
            value_cache,
            slots,
            rows,
            groups,
            width,
            block_size,
            blocks * block_size,
            *k.stride()[:2],
            *v.stride()[:2],
            key_cache.stride(0),
            value_cache.stride(0),
            ROWS=tile,
            BLOCK=block,
            **OPTIONS,
        )


def _copy_cost(cache: Tensor, copy_from: Tensor, copy_to: Tensor, staging: Tensor) -> Cost:
    # Every element is read and written twice.
    traffic = 2 * tensor_bytes(staging)
    return Cost(1, 2 * staging.numel(), traffic + tensor_bytes(copy_from) + tensor_bytes(copy_to), traffic)


@device_operator(
    "copy_blocks(Tensor(a!) cache, Tensor copy_from, Tensor copy_to, Tensor(b!) staging)",
    _copy_cost,
)
def _copy_operator(cache: Tensor, copy_from: Tensor, copy_to: Tensor, staging: Tensor) -> None:
    parts, copies, size = staging.shape
    with torch.cuda.device_of(cache):
        log_launch("copy_blocks", "triton")
        copy_blocks_kernel[(triton.cdiv(size, TILE), parts)](
            cache,
            copy_from,
            copy_to,
            staging,
            copies,
            cache.shape[1],
            size,
            *cache.stride()[:2],
            BLOCK=TILE,
            **OPTIONS,
        )


def write_kv(
    k_TGD: Tensor, v_TGD: Tensor, key_cache_BGKD: Tensor, value_cache_BGKD: Tensor, cache_slots_T: Tensor
) -> None:
    """Write keys and values to their slots; see the public function."""
    _write_operator(k_TGD, v_TGD, key_cache_BGKD, value_cache_BGKD, cache_slots_T)


def copy_blocks(cache_PB: Tensor, copy_from_C: Tensor, copy_to_C: Tensor) -> None:
    """Copy blocks of all parts; see the public function."""
    staging = cache_PB.new_empty((cache_PB.shape[0], copy_from_C.shape[0], cache_PB[0, 0].numel()))
    _copy_operator(cache_PB, copy_from_C, copy_to_C, staging)
