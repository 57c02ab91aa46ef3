"""Rotation and writes to a paged cache on CPU threads (csrc/rope.hpp): one pass, fp32 inside for bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, dtype_name
from ..dispatch import log_launch
from ..paged_kv.cpp import write_kv
from ..rope.cpp import rope_qkv
from ..rope.function import Heads

# Legend: T, rows; G, groups; Q, queries of a group; M = Q + 2; D, elements of a head; R = D / 2; B, blocks; K, tokens
# of a block.


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
    dtype = dtype_name(qkv_TGMD)
    if dtype is None:  # fp16, in two passes
        q, k, v = rope_qkv(qkv_TGMD, cos_TR, sin_TR)
        write_kv(k, v, key_cache_BGKD, value_cache_BGKD, cache_slots_T)
        out_TGQD.copy_(q.view(out_TGQD.shape))
        return
    log_launch("rope_write_kv", "cpp")
    blocks, groups, block_size, width = key_cache_BGKD.shape
    source = Heads.of_projection(qkv_TGMD)
    caches = (key_cache_BGKD, value_cache_BGKD)
    _C.rope_write_kv(
        dtype,
        tuple(map(address, source)),
        (address(out_TGQD), *map(address, caches)),
        (*qkv_TGMD.stride()[:3], *out_TGQD.stride()[:3], *(cache.stride(0) for cache in caches)),
        (qkv_TGMD.shape[0], groups, out_TGQD.shape[2], width, blocks, block_size),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        cache_slots_T.data_ptr(),
        torch.get_num_threads(),
    )
