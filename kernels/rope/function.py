"""The autograd functions of rope. Backends differ in one step, which rotates, or rotates back."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..common.precision import saturating_cast
from ..validate import single_backward, wide_dtype

# Legend: T, tokens; N, query heads; G, groups; M, heads of a group; D, elements of a head; R = D / 2.


class Heads(NamedTuple):
    """Queries [T, G, N / G, D], keys [T, G, 1, D] and, if they are copied along, values [T, G, 1, D].

    Strides are arbitrary, except that the elements of a head are neighbours.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None

    @classmethod
    def of_projection(cls, qkv_TGMD: Tensor) -> Heads:
        """Return views of a fused projection."""
        return cls(*qkv_TGMD.split([qkv_TGMD.shape[2] - 2, 1, 1], dim=2))


class Step(Protocol):
    """Writes to `to` the heads of `source`: queries and keys rotated (back, if `inverse`), values as they are."""

    def __call__(self, source: Heads, to: Heads, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> None: ...


def neighbours(x: Tensor) -> Tensor:
    """Return x if the elements of its heads are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tables(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tables as steps take them: contiguous, in the wide dtype of x."""
    dtype = wide_dtype(x)
    return cos_TR.to(dtype).contiguous(), sin_TR.to(dtype).contiguous()


def gradient_like(x: Tensor, shape: torch.Size) -> Tensor:
    """Return memory for a gradient in the dtype of x; fp32 for fp16, which is rounded afterwards."""
    return torch.empty(shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=x.device)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: Step, q_TND: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.step = step
        return _rotate(step, q_TND, k_TGD, cos_TR, sin_TR)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        single_backward("rope")
        grad_q, grad_k = map(neighbours, upstream)
        out_q, out_k = (gradient_like(x, x.shape) for x in upstream)
        cos_TR, sin_TR = ctx.saved_tensors
        _run(ctx.step, _as_heads(grad_q, grad_k), _as_heads(out_q, out_k), cos_TR, sin_TR, True)
        return None, saturating_cast(out_q, grad_q.dtype), saturating_cast(out_k, grad_k.dtype), None, None


class _RopeQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: Step, qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.step, ctx.shape = step, qkv_TGMD.shape
        return _rotate_qkv(step, qkv_TGMD, cos_TR, sin_TR)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        single_backward("rope_qkv")
        groups = ctx.shape[1]
        grads = Heads(*(neighbours(x).unflatten(1, (groups, x.shape[1] // groups)) for x in upstream))
        out = gradient_like(grads.q, ctx.shape)
        cos_TR, sin_TR = ctx.saved_tensors
        _run(ctx.step, grads, Heads.of_projection(out), cos_TR, sin_TR, True)
        return None, saturating_cast(out, grads.q.dtype), None, None


def _as_heads(q_TND: Tensor, k_TGD: Tensor) -> Heads:
    # All heads are one group: queries and keys need no common number of groups then.
    return Heads(q_TND[:, None], k_TGD[:, None], None)


def _run(step: Step, source: Heads, to: Heads, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> None:
    if source.q.shape[0]:
        step(source, to, cos_TR, sin_TR, inverse)


def _rotate(step: Step, q_TND: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TGD))
    _run(step, _as_heads(neighbours(q_TND), neighbours(k_TGD)), _as_heads(q, k), cos_TR, sin_TR, False)
    return q, k


def _rotate_qkv(step: Step, qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, heads, width = qkv_TGMD.shape
    q, k, v = (
        torch.empty((tokens, groups, size, width), dtype=qkv_TGMD.dtype, device=qkv_TGMD.device)
        for size in (heads - 2, 1, 1)
    )
    _run(step, Heads.of_projection(neighbours(qkv_TGMD)), Heads(q, k, v), cos_TR, sin_TR, False)
    return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)


def run(step: Step, q_TND: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys. Without a gradient to form, the step runs alone: the same bits."""
    cos_TR, sin_TR = tables(q_TND, cos_TR, sin_TR)
    if torch.is_grad_enabled() and (q_TND.requires_grad or k_TGD.requires_grad):
        q, k = _Rope.apply(step, q_TND, k_TGD, cos_TR, sin_TR)
        return q, k
    return _rotate(step, q_TND, k_TGD, cos_TR, sin_TR)


def run_qkv(step: Step, qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values. Without a gradient to form, the step runs alone: the same bits."""
    cos_TR, sin_TR = tables(qkv_TGMD, cos_TR, sin_TR)
    if torch.is_grad_enabled() and qkv_TGMD.requires_grad:
        q, k, v = _RopeQKV.apply(step, qkv_TGMD, cos_TR, sin_TR)
        return q, k, v
    return _rotate_qkv(step, qkv_TGMD, cos_TR, sin_TR)
