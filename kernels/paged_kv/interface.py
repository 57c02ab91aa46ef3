"""Writes to a paged KV cache, in place.

A cache is [B, G, K, D]: within a block, the K tokens of a key/value head are neighbours. A program of decode attention
has one head of a sequence and so reads K * D elements in a row (2 or 4 KiB of bf16 at K = 16); with the heads inside
the tokens it would read rows of D elements that lie G * D apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..dispatch import select

# Legend: T, rows; B, blocks; G, key/value heads; K, tokens of a block (block_size); D, elements of a head; C, copies;
# P, parts of a cache: keys and values of all layers.


def write_kv(
    k_TGD: Tensor, v_TGD: Tensor, key_cache_BGKD: Tensor, value_cache_BGKD: Tensor, cache_slots_T: Tensor
) -> None:
    """Write the keys and values of rows to their slots of a paged cache, in place.

        cache[slot // K, :, slot % K] = row

    Args:
        k_TGD: [T, G, D] floating, rotated keys. Views of heads are read in place.
        v_TGD: [T, G, D], dtype of k_TGD.
        key_cache_BGKD: [B, G, K, D], dtype of k_TGD. Blocks may lie apart; each is contiguous.
        value_cache_BGKD: like key_cache_BGKD.
        cache_slots_T: [T] int32, block * K + offset; no two rows have the same. A slot below 0 is padding: its row is
            not written. A slot beyond the cache is an error on CPUs; on a device its row is not written.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device, stride or slot is wrong.
    """
    op = "write_kv"
    check_caches(op, key_cache_BGKD, value_cache_BGKD)
    _, groups, _, width = key_cache_BGKD.shape
    for name, x in (("k_TGD", k_TGD), ("v_TGD", v_TGD)):
        validate.check_floating(op, name, x, (k_TGD.shape[0], groups, width), key_cache_BGKD)
        check_dtype(op, name, x, key_cache_BGKD.dtype, "the cache")
    check_int32(op, "cache_slots_T", cache_slots_T, (k_TGD.shape[0],), key_cache_BGKD)
    if k_TGD.numel():
        rows = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (k_TGD, v_TGD))
        select(op, k_TGD)(*rows, key_cache_BGKD, value_cache_BGKD, cache_slots_T.contiguous())


def copy_blocks(cache_PB: Tensor, copy_from_C: Tensor, copy_to_C: Tensor) -> None:
    """Copy blocks within every part of a cache, in place. All sources are read before any target is written.

        cache[p, copy_to[c]] = cache[p, copy_from[c]]

    One call serves the keys and values of all layers, if they are one tensor.

    Args:
        cache_PB: [P, B, ...]: parts, blocks, and what a block contains. Blocks may lie apart; each is contiguous.
        copy_from_C: [C] int32, blocks.
        copy_to_C: [C] int32, blocks; no two are the same. A copy with a block below 0 is padding: it is not made. A
            block beyond the cache is an error on CPUs; on a device its copy is not made.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device, stride or block is wrong.
    """
    op = "copy_blocks"
    if isinstance(cache_PB, Tensor) and cache_PB.dim() < 3:
        raise ValueError(f"{op}: cache_PB must have parts, blocks and contents, got shape {tuple(cache_PB.shape)}")
    validate.check_floating(op, "cache_PB", cache_PB, (None,) * getattr(cache_PB, "ndim", 0))
    if not cache_PB[:1, :1].is_contiguous():
        raise ValueError(f"{op}: each block of cache_PB must be contiguous, got strides {cache_PB.stride()}")
    check_int32(op, "copy_from_C", copy_from_C, (None,), cache_PB)
    check_int32(op, "copy_to_C", copy_to_C, (copy_from_C.shape[0],), cache_PB)
    if copy_from_C.numel() and cache_PB.numel():
        select(op, cache_PB)(cache_PB, copy_from_C.contiguous(), copy_to_C.contiguous())


def check_caches(op: str, key_cache_BGKD: Tensor, value_cache_BGKD: Tensor) -> None:
    """Raise unless two caches have one shape, dtype and device, and contiguous blocks."""
    if validate.is_unchecked():
        return
    validate.check_floating(op, "key_cache_BGKD", key_cache_BGKD, (None,) * 4)
    validate.check_floating(op, "value_cache_BGKD", value_cache_BGKD, tuple(key_cache_BGKD.shape), key_cache_BGKD)
    check_dtype(op, "value_cache_BGKD", value_cache_BGKD, key_cache_BGKD.dtype, "key_cache_BGKD")
    for name, cache in (("key_cache_BGKD", key_cache_BGKD), ("value_cache_BGKD", value_cache_BGKD)):
        if not cache[:1].is_contiguous():
            raise ValueError(f"{op}: each block of {name} must be contiguous, got strides {cache.stride()}")
        if cache.stride(0) % max(1, cache.shape[3]):
            raise ValueError(f"{op}: blocks of {name} must lie a multiple of {cache.shape[3]} elements apart")
        if cache.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient: it is written in place")


def check_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype, like: str) -> None:
    """Raise unless x has a dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype} like {like}, got {x.dtype}")


def check_int32(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """Raise unless x is an int32 tensor of `shape`, on the device of `like`: the arrays of a step's plan."""
    validate.check_integral(op, name, x, shape, like)
    if x.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, got {x.dtype}")
