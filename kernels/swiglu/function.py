"""The autograd function of swiglu. Backends differ in the two steps that it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..validate import single_backward


@dataclass(frozen=True)
class Steps:
    """The two steps of a backend, on contiguous tensors.

    Attributes:
        forward: Writes the activation of gate_up to the second tensor.
        backward: Returns the gradient by gate_up, from gate_up and the gradient of the activation.
    """

    forward: Callable[[Tensor, Tensor], None]
    backward: Callable[[Tensor, Tensor], Tensor]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Steps, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.steps = steps
        return _activate(steps, gate_up, None)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        single_backward("swiglu")
        (grad,) = upstream
        (gate_up,) = ctx.saved_tensors
        return None, ctx.steps.backward(gate_up, grad.contiguous())


def _activate(steps: Steps, gate_up: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        steps.forward(gate_up, out)
    return out


def run(steps: Steps, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the activation. Without a gradient to form, the step runs alone: the same bits, less overhead."""
    gate_up = gate_up.contiguous()
    if torch.is_grad_enabled() and gate_up.requires_grad:
        activated: Tensor = _SwiGLU.apply(steps, gate_up)
        return activated
    return _activate(steps, gate_up, out)
