"""kl_divergence in Triton, and the estimator that shaped_gae shares with it: one launch a direction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import log_launch
from ..validate import single_backward
from .reference import EXPONENT_LIMIT

BLOCK = 2048
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def estimate(d, ESTIMATOR: tl.constexpr, LIMIT: tl.constexpr):
    """The estimator of the difference d = logprob - ref_logprob."""
    if ESTIMATOR == "k1":
        return d
    elif ESTIMATOR == "k2":
        return 0.5 * d * d
    elif ESTIMATOR == "abs":
        return tl.abs(d)
    else:
        x = -d
        bounded = tl.minimum(x, LIMIT)
        plain = tl.exp(bounded) - 1.0 + (x - bounded) * tl.exp(tl.full((), LIMIT, tl.float32)) - x
        # exp(x) - 1 - x cancels near 0; its series to x^9 is exact to fp32 for |x| < 0.5.
        series = 1.0 / 40320.0 + x * (1.0 / 362880.0)
        series = 1.0 / 720.0 + x * (1.0 / 5040.0 + x * series)
        series = 0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * series)))
        return tl.where(tl.abs(x) < 0.5, x * x * series, plain)


@triton.jit
def slope(d, ESTIMATOR: tl.constexpr, LIMIT: tl.constexpr):
    """The derivative of the estimator by d."""
    if ESTIMATOR == "k1":
        return d * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        return d
    elif ESTIMATOR == "abs":
        return tl.where(d > 0.0, 1.0, 0.0) - tl.where(d < 0.0, 1.0, 0.0)
    else:
        x = tl.minimum(-d, LIMIT)
        # 1 - exp(x) cancels near 0 too.
        series = 1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0 + x * (1.0 / 40320.0)))
        series = 1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * series)))
        return -tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def kl_forward_kernel(
    logprob_ptr, ref_ptr, out_ptr, size, ESTIMATOR: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    d = tl.load(logprob_ptr + at, mask=here, other=0.0).to(tl.float32)
    d -= tl.load(ref_ptr + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, estimate(d, ESTIMATOR, LIMIT), mask=here)


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
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    d = tl.load(logprob_ptr + at, mask=here, other=0.0).to(tl.float32)
    d -= tl.load(ref_ptr + at, mask=here, other=0.0).to(tl.float32)
    grad = tl.load(upstream_ptr + at, mask=here, other=0.0) * slope(d, ESTIMATOR, LIMIT)
    tl.store(logprob_grad_ptr + at, grad, mask=here)
    tl.store(ref_grad_ptr + at, -grad, mask=here)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprob_A, ref_logprob_A, estimator):
        ctx.save_for_backward(logprob_A, ref_logprob_A)
        ctx.estimator = estimator
        out_A = torch.empty(logprob_A.shape, dtype=torch.float32, device=logprob_A.device)
        _launch(kl_forward_kernel, estimator, logprob_A, ref_logprob_A, out_A)
        return out_A

    @staticmethod
    def backward(ctx, upstream_A):
        single_backward("kl_divergence")
        logprob_A, ref_logprob_A = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logprob_A, ref_logprob_A)]
        _launch(kl_backward_kernel, ctx.estimator, logprob_A, ref_logprob_A, upstream_A, *grads)
        return *grads, None


def _launch(kernel, estimator: str, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    if size:
        with torch.cuda.device_of(tensors[0]):
            log_launch(kernel.__name__, "triton")
            kernel[(triton.cdiv(size, BLOCK),)](
                *(x.contiguous() for x in tensors),
                size,
                ESTIMATOR=estimator,
                LIMIT=EXPONENT_LIMIT,
                BLOCK=BLOCK,
                **OPTIONS,
            )


def kl_divergence(logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
    return _Divergence.apply(logprob_A, ref_logprob_A, estimator)
