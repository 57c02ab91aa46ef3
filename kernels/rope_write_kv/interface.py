"""A step of a decoder between the fused projection and attention: rotation, and the writes to a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..dispatch import select
from ..paged_kv.interface import check_caches, check_dtype, check_int32
from ..rope.function import neighbours, tables
from ..rope.interface import check_qkv

# Legend: T, rows; G, key/value heads (groups); M, heads of a group: its queries, key and value; N = G (M - 2), query
# heads; D, elements of a head; R = D / 2; B, blocks; K, tokens of a block.


def rope_write_kv(
    qkv_TGMD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    key_cache_BGKD: Tensor,
    value_cache_BGKD: Tensor,
    cache_slots_T: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the rotated queries of a fused projection; write rotated keys, and values, to their slots of a cache.

        q, k, v = rope_qkv(qkv, cos, sin),   write_kv(k, v, key_cache, value_cache, cache_slots)

    One pass and one launch, with the bits of these two calls. Source of the rotation: Su et al. 2021
    (arXiv:2104.09864).

    Args:
        qkv_TGMD: [T, G, M, D] floating, M >= 3: a group has its queries, then its key and its value.
        cos_TR: [T, D / 2] floating, cosines of the angles.
        sin_TR: [T, D / 2] floating, sines.
        key_cache_BGKD: [B, G, K, D], dtype of qkv_TGMD. Blocks may lie apart; each is contiguous.
        value_cache_BGKD: like key_cache_BGKD.
        cache_slots_T: [T] int32, block * K + offset; no two rows have the same. A slot below 0 is padding: key and
            value of its row are not written. A slot beyond the cache is an error on CPUs, before anything is written;
            on a device its key and value are not written.
        out: [T, N, D], dtype of qkv_TGMD, heads contiguous, written in place; None: it is allocated.

    Returns:
        [T, N, D] in the dtype of qkv_TGMD, rotated queries, those of padding included; `out` if it was passed. There
        is no gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device, stride or slot is wrong, `out` overlaps with the projection, or a gradient is
            asked for.
    """
    op = "rope_write_kv"
    if out is not None and validate.is_unchecked():
        queries = out.view(out.shape[0], qkv_TGMD.shape[1], -1, out.shape[2])
        select(op, qkv_TGMD)(qkv_TGMD, cos_TR, sin_TR, key_cache_BGKD, value_cache_BGKD, cache_slots_T, queries)
        return out
    # 1. The cache, and a projection that fits it.
    check_caches(op, key_cache_BGKD, value_cache_BGKD)
    check_qkv(op, qkv_TGMD, cos_TR, sin_TR)
    tokens, groups, heads, width = qkv_TGMD.shape
    _, cache_groups, _, cache_width = key_cache_BGKD.shape
    if (groups, width) != (cache_groups, cache_width) or qkv_TGMD.device != key_cache_BGKD.device:
        raise ValueError(
            f"{op}: qkv_TGMD must have {cache_groups} groups of heads of {cache_width} elements on "
            f"{key_cache_BGKD.device} like the cache, got shape {tuple(qkv_TGMD.shape)} on {qkv_TGMD.device}"
        )
    check_dtype(op, "qkv_TGMD", qkv_TGMD, key_cache_BGKD.dtype, "the cache")
    check_int32(op, "cache_slots_T", cache_slots_T, (tokens,), qkv_TGMD)
    if qkv_TGMD.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: there is no gradient; call it under torch.no_grad()")
    # 2. Memory of the queries.
    shape = (tokens, groups * (heads - 2), width)
    if out is None:
        out = torch.empty(shape, dtype=qkv_TGMD.dtype, device=qkv_TGMD.device)
    else:
        validate.check_out(op, "out", out, shape, (qkv_TGMD,))
        if out.stride(-1) != 1 and width > 1:
            raise ValueError(f"{op}: heads of out must be contiguous, got strides {out.stride()}")
        validate.check_apart(op, "out", out, "qkv_TGMD", qkv_TGMD)
    if out.numel():
        cos_TR, sin_TR = tables(qkv_TGMD, cos_TR.detach(), sin_TR.detach())
        slots_T, queries = cache_slots_T.contiguous(), out.unflatten(1, (groups, heads - 2))
        run = select(op, qkv_TGMD)
        run(neighbours(qkv_TGMD.detach()), cos_TR, sin_TR, key_cache_BGKD, value_cache_BGKD, slots_T, queries)
    return out
