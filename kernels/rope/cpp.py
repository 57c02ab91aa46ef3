"""rope on CPU threads (csrc/rope.hpp): queries, keys and values in one pass, fp32 inside for bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, dtype_name, hold
from ..dispatch import log_launch
from .function import Heads, run, run_qkv

# Legend: T, tokens; N, query heads; G, groups; M, heads of a group; D, elements of a head; R = D / 2.

_NO_HEADS = (0,) * 7


def _step(source: Heads, to: Heads, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> None:
    dtype = dtype_name(*source, *to)
    if dtype is None:  # fp16, also with a gradient in fp32: widened, and rounded as it is written
        wide, out = (Heads(x.q.float(), x.k.float(), None if x.v is None else x.v.float()) for x in (source, to))
        _step(wide, out, cos_TR, sin_TR, inverse)
        for x, result in zip(to, out, strict=True):
            if x is not None and result is not None:
                x.copy_(result)
        return
    log_launch("rope", "cpp")
    tokens, groups = source.q.shape[:2]
    strides = tuple(
        _NO_HEADS if x is None or out is None else (x.shape[2], *x.stride()[:3], *out.stride()[:3])
        for x, out in zip(source, to, strict=True)
    )
    _C.rope(
        dtype,
        tuple(map(address, source)),
        tuple(map(address, to)),
        strides,
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        tokens,
        groups,
        cos_TR.shape[1],
        inverse,
        torch.get_num_threads(),
    )
    hold(*source, *to, cos_TR, sin_TR)


def rope(q_TND: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys; see the public function."""
    return run(_step, q_TND, k_TGD, cos_TR, sin_TR)


def rope_qkv(qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values; see the public function."""
    return run_qkv(_step, qkv_TGMD, cos_TR, sin_TR)
