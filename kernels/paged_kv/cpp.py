"""Writes to a paged KV cache on CPU threads (csrc/paged_kv.hpp). They move bytes of any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import hold
from ..dispatch import log_launch


def write_kv(
    k_TGD: Tensor, v_TGD: Tensor, key_cache_BGKD: Tensor, value_cache_BGKD: Tensor, cache_slots_T: Tensor
) -> None:
    """Write keys and values to their slots; see the public function."""
    log_launch("write_kv", "cpp")
    _C.write_kv(
        k_TGD.element_size(),
        (k_TGD.data_ptr(), v_TGD.data_ptr(), key_cache_BGKD.data_ptr(), value_cache_BGKD.data_ptr()),
        (*k_TGD.stride()[:2], *v_TGD.stride()[:2], key_cache_BGKD.stride(0), value_cache_BGKD.stride(0)),
        tuple(key_cache_BGKD.shape),
        cache_slots_T.data_ptr(),
        cache_slots_T.shape[0],
        torch.get_num_threads(),
    )
    hold(k_TGD, v_TGD, key_cache_BGKD, value_cache_BGKD, cache_slots_T)


def copy_blocks(cache_PB: Tensor, copy_from_C: Tensor, copy_to_C: Tensor) -> None:
    """Copy blocks of all parts; see the public function."""
    log_launch("copy_blocks", "cpp")
    size = cache_PB.element_size()
    _C.copy_blocks(
        cache_PB.data_ptr(),
        cache_PB.shape[0],
        cache_PB.shape[1],
        (cache_PB.stride(0) * size, cache_PB.stride(1) * size, cache_PB[0, 0].numel() * size),
        copy_from_C.data_ptr(),
        copy_to_C.data_ptr(),
        copy_from_C.shape[0],
        torch.get_num_threads(),
    )
    hold(cache_PB, copy_from_C, copy_to_C)
