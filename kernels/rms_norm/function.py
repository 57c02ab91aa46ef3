"""The autograd function of the fused norms. Backends differ in the two steps that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..validate import single_backward

# Legend: H, elements of a row; S, rows.


class Forward(NamedTuple):
    """What a forward step returns: like x, like x (x itself without a residual), and 1 / rms of each row [S]."""

    normed: Tensor
    total: Tensor
    scale_S: Tensor | None


class Buffers(NamedTuple):
    """Where a forward step writes: the norm, the sum, and whether it forms scale_S. None: it allocates."""

    out: Tensor | None = None
    sum_out: Tensor | None = None
    saves_scale: bool = False


class ForwardStep(Protocol):
    """Normalises rows, or their sums with a residual."""

    def __call__(
        self, x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float, buffers: Buffers
    ) -> Forward: ...


class BackwardStep(Protocol):
    """Returns the gradients by the rows that were normalised, and by the weight if `weighted`."""

    def __call__(
        self,
        grad: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        weight_H: Tensor,
        scale_S: Tensor,
        weighted: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Steps:
    """The two steps of a backend."""

    forward: ForwardStep
    backward: BackwardStep


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: Steps, x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        normed, total, scale_S = steps.forward(x, residual, weight_H, eps, Buffers(saves_scale=True))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight_H, scale_S)
        ctx.steps, ctx.added = steps, residual is not None
        return normed, total if residual is not None else None

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        single_backward("add_rms_norm" if ctx.added else "rms_norm")
        grad, grad_total = upstream
        if grad is None:  # only the sum was used
            return None, grad_total, grad_total, None, None
        total, weight_H, scale_S = ctx.saved_tensors
        weighted = ctx.needs_input_grad[3]
        grad_x, grad_weight_H = ctx.steps.backward(grad, grad_total, total, weight_H, scale_S, weighted)
        return None, grad_x, grad_x if ctx.added else None, grad_weight_H, None


def run(
    steps: Steps,
    x: Tensor,
    residual: Tensor | None,
    weight_H: Tensor,
    eps: float,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (norm, sum or None). Without a gradient to form, the step runs alone: the same bits, less overhead."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight_H.requires_grad or (residual is not None and residual.requires_grad)
    ):
        normed, total = _RMSNorm.apply(steps, x, residual, weight_H, eps)
        return normed, total
    normed, total, _ = steps.forward(x, residual, weight_H, eps, Buffers(out, sum_out))
    return normed, total


def output_strides(out: Tensor) -> tuple[int, int, int]:
    """Return how the rows of an output lie. The public function refuses one for which `row_strides` has no answer."""
    strides = row_strides(out)
    assert strides is not None
    return strides


def row_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Return how the rows of x lie in memory: (inner, outer_stride, inner_stride), in rows and elements.

    Row i starts at (i // inner) * outer_stride + (i % inner) * inner_stride. None: a copy is needed.
    """
    if x.is_contiguous():
        return max(1, x.numel() // max(1, x.shape[-1])), 0, x.shape[-1]
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    # Merge dimensions from the last to the first: those that continue the one before them need no stride of their own.
    merged: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = (*merged, (1, 0), (1, 0))[:2]
    return inner, outer_stride, inner_stride
