"""Packed attention on CPU threads (csrc/packed_attention.hpp): heads are read in place, fp32 inside for bf16."""

from __future__ import annotations

import math
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, dtype_name, hold
from ..common.precision import saturating_cast
from ..dispatch import log_launch
from ..validate import single_backward

# Legend: T, queries of all sequences; K, their keys; N, query heads; G, key/value heads; D, elements of a head.


class _Sequences(NamedTuple):
    """Queries and keys of each sequence, as int64, and the window; 0: none."""

    lengths: array[int]
    key_lengths: array[int]
    window: int


def _launch(name: str, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...], of: _Sequences) -> None:
    """Run the extension: inputs are q, k, v and the gradient, outputs the result and the gradients by q, k and v."""
    log_launch(name, "cpp")
    tensors = (*inputs, *outputs)
    q, k = tensors[:2]
    assert q is not None and k is not None
    dtype = dtype_name(*tensors)
    assert dtype is not None
    _C.packed_attention(
        dtype,
        tuple(map(address, tensors)),
        tuple(stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])),
        (of.lengths.buffer_info()[0], of.key_lengths.buffer_info()[0]),
        (len(of.lengths), q.shape[1], k.shape[1], q.shape[2], of.window),
        1.0 / math.sqrt(q.shape[2]),
        torch.get_num_threads(),
    )
    hold(*tensors)


def _neighbours(x: Tensor) -> Tensor:
    """Return x if the elements of its heads are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend(q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, of: _Sequences) -> Tensor:
    out = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    _launch("packed_attention_forward", (q_TND, k_KGD, v_KGD, None), (out, None, None, None), of)
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, of: _Sequences) -> Tensor:
        ctx.save_for_backward(q_TND, k_KGD, v_KGD)
        ctx.of = of
        return _attend(q_TND, k_KGD, v_KGD, of)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward("packed_attention")
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
        _launch("packed_attention_backward", (*inputs, _neighbours(upstream[0])), (None, *grads), ctx.of)
        return *grads, None


def packed_attention(
    q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, lengths: list[int], key_lengths: list[int], window: int | None
) -> Tensor:
    """Return causal attention within each sequence; see the public function."""
    if dtype_name(q_TND) is None:  # fp16
        attended = packed_attention(q_TND.float(), k_KGD.float(), v_KGD.float(), lengths, key_lengths, window)
        return saturating_cast(attended, q_TND.dtype)
    of = _Sequences(array("q", lengths), array("q", key_lengths), window or 0)
    q_TND, k_KGD, v_KGD = _neighbours(q_TND), _neighbours(k_KGD), _neighbours(v_KGD)
    if torch.is_grad_enabled() and (q_TND.requires_grad or k_KGD.requires_grad or v_KGD.requires_grad):
        out: Tensor = _PackedAttention.apply(q_TND, k_KGD, v_KGD, of)
        return out
    return _attend(q_TND, k_KGD, v_KGD, of)
