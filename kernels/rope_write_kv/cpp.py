"""Rotation and writes to a paged cache on CPU threads (csrc/rope.hpp): one pass, fp32 inside for bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import dtype_name, hold
from ..dispatch import log_launch
from ..paged_kv.cpp import write_kv
from ..rope.cpp import rope_qkv

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
    # The first query of the first row, its key and its value.
    queries, first = out_TGQD.shape[2], qkv_TGMD.data_ptr()
    head_bytes = qkv_TGMD.stride(2) * qkv_TGMD.element_size()
    _C.rope_write_kv(
        dtype,
        (first, first + queries * head_bytes, first + (queries + 1) * head_bytes),
        (out_TGQD.data_ptr(), key_cache_BGKD.data_ptr(), value_cache_BGKD.data_ptr()),
        (*qkv_TGMD.stride()[:3], *out_TGQD.stride()[:3], key_cache_BGKD.stride(0), value_cache_BGKD.stride(0)),
        (qkv_TGMD.shape[0], groups, queries, width, blocks, block_size),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        cache_slots_T.data_ptr(),
        torch.get_num_threads(),
    )
    hold(qkv_TGMD, out_TGQD, key_cache_BGKD, value_cache_BGKD, cos_TR, sin_TR, cache_slots_T)
