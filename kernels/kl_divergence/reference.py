"""kl_divergence in plain PyTorch, and exponentials that stay finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..validate import wide_dtype

# Legend: A, actions of the packed stream; d_A = logprob_A - ref_logprob_A.

# exp() continues along its tangent beyond this exponent, so that neither it nor 0 * exp() leaves fp32's range.
EXPONENT_LIMIT = 60.0


def kl_divergence(logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
    """Return the estimator by token; see the public function."""
    dtype = wide_dtype(logprob_A, ref_logprob_A)
    d_A = logprob_A.to(dtype) - ref_logprob_A.to(dtype)
    if estimator == "k1":
        return d_A
    if estimator == "k2":
        return 0.5 * d_A * d_A
    if estimator == "k3":
        # expm1, not exp - 1: k3 is of the order of d^2 near 0, and the difference would lose its digits.
        return safe_expm1(-d_A) + d_A
    return d_A.abs()


def safe_expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1 up to EXPONENT_LIMIT and its tangent beyond: finite and increasing, like its gradient."""
    return torch.expm1(x.clamp(max=EXPONENT_LIMIT)) + _tangent(x)


def safe_exp(x: Tensor) -> Tensor:
    """Return exp(x) up to EXPONENT_LIMIT and its tangent beyond."""
    return torch.exp(x.clamp(max=EXPONENT_LIMIT)) + _tangent(x)


def _tangent(x: Tensor) -> Tensor:
    # A clamp of its own, not x minus the clamped x: below the limit the slope must be 0, not exp(60) - exp(60).
    return (x - EXPONENT_LIMIT).clamp(min=0) * math.exp(EXPONENT_LIMIT)
