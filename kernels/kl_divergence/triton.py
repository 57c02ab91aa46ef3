"""kl_divergence in Triton: one launch forward, one launch backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.precision import saturating_cast
from ..common.triton import floor_logprob, kl_estimate
from ..dispatch import log_launch
from ..validate import single_backward
from .reference import EXPONENT_LIMIT, LOGPROB_FLOOR

# Legend
#   A      actions of the packed stream (any shape; kernels see it flat)
#   d      logprob - ref_logprob, fp32
#   LIMIT  exponent beyond which exp() continues along its tangent
#   BLOCK  tokens of one program

BLOCK = 2048
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# Operations per token, for the declared cost; k3 evaluates a series of seven terms and an exponential.
FLOPS = {"k1": 1, "k2": 3, "k3": 20, "abs": 2}


@triton.jit
def kl_slope(d, ESTIMATOR: tl.constexpr, LIMIT: tl.constexpr):
    """Return the derivative of the estimator by d."""
    if ESTIMATOR == "k1":
        return d * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        return d
    elif ESTIMATOR == "abs":
        return tl.where(d > 0.0, 1.0, 0.0) - tl.where(d < 0.0, 1.0, 0.0)
    else:
        # Not minimum: it would turn NaN into LIMIT.
        x = tl.where(-d > LIMIT, LIMIT, -d)
        # -slope = exp(x) - 1 cancels near 0; its series to x^8 is exact to fp32 for |x| < 0.5.
        series = 1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0 + x * (1.0 / 40320.0)))
        series = 1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * series)))
        return -tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def kl_forward_kernel(
    logprob_ptr,
    ref_ptr,
    out_ptr,
    size,
    ESTIMATOR: tl.constexpr,
    LIMIT: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the estimator of BLOCK tokens."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    d = floor_logprob(tl.load(logprob_ptr + offsets, mask=inside, other=0.0).to(tl.float32), FLOOR)
    d -= floor_logprob(tl.load(ref_ptr + offsets, mask=inside, other=0.0).to(tl.float32), FLOOR)
    tl.store(out_ptr + offsets, kl_estimate(d, ESTIMATOR, LIMIT), mask=inside)


@triton.jit
def kl_backward_kernel(
    logprob_ptr,
    ref_ptr,
    upstream_ptr,
    logprob_grad_ptr,
    ref_grad_ptr,
    size,
    ESTIMATOR: tl.constexpr,
    LIMIT: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of BLOCK tokens by both log-probs; at finite log-probs they differ in sign alone."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    logprob = tl.load(logprob_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    ref = tl.load(ref_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    d = floor_logprob(logprob, FLOOR) - floor_logprob(ref, FLOOR)
    grad = tl.load(upstream_ptr + offsets, mask=inside, other=0.0) * kl_slope(d, ESTIMATOR, LIMIT)
    # A log-prob of -inf is a constant.
    tl.store(logprob_grad_ptr + offsets, tl.where(logprob == -float("inf"), 0.0, grad), mask=inside)
    tl.store(ref_grad_ptr + offsets, tl.where(ref == -float("inf"), 0.0, -grad), mask=inside)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
        ctx.save_for_backward(logprob_A, ref_logprob_A)
        ctx.estimator = estimator
        out_A = torch.empty(logprob_A.shape, dtype=torch.float32, device=logprob_A.device)
        if out_A.numel():
            _forward_step(logprob_A.contiguous(), ref_logprob_A.contiguous(), out_A, estimator)
        return out_A

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward("kl_divergence")
        (grad_A,) = upstream
        logprob_A, ref_logprob_A = ctx.saved_tensors
        # Contiguous whatever the inputs' strides are: the kernel writes flat.
        # fp16 is rounded afterwards: the kernel would write infinity beyond its range.
        inputs = (logprob_A, ref_logprob_A)
        dtypes = [torch.float32 if x.dtype == torch.float16 else x.dtype for x in inputs]
        grads = [torch.empty(x.shape, dtype=dtype, device=x.device) for x, dtype in zip(inputs, dtypes, strict=True)]
        if grad_A.numel():
            _backward_step(*(x.contiguous() for x in (*inputs, grad_A)), *grads, ctx.estimator)
        return *(saturating_cast(grad, x.dtype) for grad, x in zip(grads, inputs, strict=True)), None


def _forward_cost(logprob_A: Tensor, ref_logprob_A: Tensor, out_A: Tensor, estimator: str) -> Cost:
    return Cost.of_pass([logprob_A, ref_logprob_A], [out_A], out_A.numel() * FLOPS[estimator])


@device_operator("kl_forward_kernel(Tensor logprob, Tensor ref_logprob, Tensor(a!) out, str estimator)", _forward_cost)
def _forward_step(logprob_A: Tensor, ref_logprob_A: Tensor, out_A: Tensor, estimator: str) -> None:
    _launch(kl_forward_kernel, estimator, logprob_A, ref_logprob_A, out_A)


def _backward_cost(
    logprob_A: Tensor,
    ref_logprob_A: Tensor,
    grad_A: Tensor,
    logprob_grad_A: Tensor,
    ref_grad_A: Tensor,
    estimator: str,
) -> Cost:
    flops = grad_A.numel() * (FLOPS[estimator] + 2)
    return Cost.of_pass([logprob_A, ref_logprob_A, grad_A], [logprob_grad_A, ref_grad_A], flops)


@device_operator(
    "kl_backward_kernel(Tensor logprob, Tensor ref_logprob, Tensor grad, Tensor(a!) logprob_grad, "
    "Tensor(b!) ref_grad, str estimator)",
    _backward_cost,
)
def _backward_step(
    logprob_A: Tensor,
    ref_logprob_A: Tensor,
    grad_A: Tensor,
    logprob_grad_A: Tensor,
    ref_grad_A: Tensor,
    estimator: str,
) -> None:
    _launch(kl_backward_kernel, estimator, logprob_A, ref_logprob_A, grad_A, logprob_grad_A, ref_grad_A)


def _launch(kernel: Any, estimator: str, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):
        log_launch(kernel.__name__, "triton")
        kernel[(triton.cdiv(size, BLOCK),)](
            *tensors,
            size,
            ESTIMATOR=estimator,
            LIMIT=EXPONENT_LIMIT,
            FLOOR=LOGPROB_FLOOR,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def kl_divergence(logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
    """Return the estimator by token; see the public function."""
    return _Divergence.apply(logprob_A, ref_logprob_A, estimator)
