"""swiglu in Triton: one launch forward, one backward, which computes the activation again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.precision import saturating_cast
from ..dispatch import log_launch
from .function import Steps, run

# Legend: a row is [gate, up], of 2 * width elements; BLOCK elements of a row's width are one program.

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Operations per element of the activation, for the declared cost.
FORWARD_FLOPS, BACKWARD_FLOPS = 5, 11


@triton.jit
def swiglu_forward_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Write silu(gate) * up of BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, gate * (1.0 / (1.0 + tl.exp(-gate))) * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(gate_up_ptr, grad_ptr, grad_gate_up_ptr, width, BLOCK: tl.constexpr):
    """Write the gradients by gate and up of BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_up_ptr + row * 2 * width + column, grad_gate, mask=inside)
    tl.store(grad_gate_up_ptr + row * 2 * width + width + column, grad * gate * sigmoid, mask=inside)


def _forward_cost(gate_up: Tensor, out: Tensor) -> Cost:
    return Cost.of_pass([gate_up], [out], FORWARD_FLOPS * out.numel())


@device_operator("swiglu_forward(Tensor gate_up, Tensor(a!) out)", _forward_cost)
def _forward_step(gate_up: Tensor, out: Tensor) -> None:
    width = out.shape[-1]
    with torch.cuda.device_of(out):
        log_launch("swiglu_forward", "triton")
        swiglu_forward_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](
            gate_up, out, width, BLOCK=BLOCK, **OPTIONS
        )


def _backward_cost(gate_up: Tensor, grad: Tensor, grad_gate_up: Tensor) -> Cost:
    return Cost.of_pass([gate_up, grad], [grad_gate_up], BACKWARD_FLOPS * grad.numel())


@device_operator("swiglu_backward(Tensor gate_up, Tensor grad, Tensor(a!) grad_gate_up)", _backward_cost)
def _backward_step(gate_up: Tensor, grad: Tensor, grad_gate_up: Tensor) -> None:
    width = grad.shape[-1]
    with torch.cuda.device_of(grad):
        log_launch("swiglu_backward", "triton")
        swiglu_backward_kernel[(grad.numel() // width, triton.cdiv(width, BLOCK))](
            gate_up, grad, grad_gate_up, width, BLOCK=BLOCK, **OPTIONS
        )


def _backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    # fp16 is rounded afterwards: the kernel would write infinity beyond its range.
    dtype = torch.float32 if gate_up.dtype == torch.float16 else gate_up.dtype
    grad_gate_up = torch.empty(gate_up.shape, dtype=dtype, device=gate_up.device)
    if grad.numel():
        _backward_step(gate_up, grad, grad_gate_up)
    return saturating_cast(grad_gate_up, gate_up.dtype)


_STEPS = Steps(_forward_step, _backward)


def swiglu(gate_up: Tensor, out: Tensor | None) -> Tensor:
    """Return silu(gate) * up; see the public function."""
    return run(_STEPS, gate_up, out)
