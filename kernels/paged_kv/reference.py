"""Writes to a paged KV cache in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def write_kv(
    k_TGD: Tensor, v_TGD: Tensor, key_cache_BGKD: Tensor, value_cache_BGKD: Tensor, cache_slots_T: Tensor
) -> None:
    """Write keys and values to their slots; see the public function."""
    blocks, _, block_size, _ = key_cache_BGKD.shape
    if (cache_slots_T >= blocks * block_size).any():
        raise ValueError(f"cache_slots_T must be below the {blocks * block_size} slots of the cache")
    kept = cache_slots_T >= 0
    slots = cache_slots_T[kept].long()
    for cache, rows in ((key_cache_BGKD, k_TGD), (value_cache_BGKD, v_TGD)):
        cache[slots // block_size, :, slots % block_size] = rows[kept]


def copy_blocks(cache_PB: Tensor, copy_from_C: Tensor, copy_to_C: Tensor) -> None:
    """Copy blocks of all parts; see the public function."""
    blocks = cache_PB.shape[1]
    if (copy_from_C >= blocks).any() or (copy_to_C >= blocks).any():
        raise ValueError(f"copies must be between the {blocks} blocks of the cache")
    kept = (copy_from_C >= 0) & (copy_to_C >= 0)
    # The sources are read into a tensor of their own first.
    cache_PB[:, copy_to_C[kept].long()] = cache_PB[:, copy_from_C[kept].long()]
