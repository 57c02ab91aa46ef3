"""Rotation and writes to a paged cache in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..paged_kv.reference import write_kv
from ..rope.reference import rope_qkv


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
    q, k, v = rope_qkv(qkv_TGMD, cos_TR, sin_TR)
    write_kv(k, v, key_cache_BGKD, value_cache_BGKD, cache_slots_T)
    out_TGQD.copy_(q.view(out_TGQD.shape))
