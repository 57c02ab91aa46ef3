"""kl_divergence in plain PyTorch, and exponentials that stay finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.precision import widen
from ..validate import wide_dtype

# Legend: A, actions of the packed stream; d_A = logprob_A - ref_logprob_A.

# exp() continues along its tangent beyond this exponent, so that neither it nor 0 * exp() leaves fp32's range.
EXPONENT_LIMIT = 60.0
# A log-prob of -inf, as of a filtered token, enters differences as this number: exp() of it is 0, and it stays finite.
LOGPROB_FLOOR = -1e4


def kl_divergence(logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
    """Return the estimator by token; see the public function."""
    dtype = wide_dtype(logprob_A, ref_logprob_A)
    return estimate_kl(floor_logprob(widen(logprob_A, dtype)) - floor_logprob(widen(ref_logprob_A, dtype)), estimator)


def estimate_kl(d_A: Tensor, estimator: str) -> Tensor:
    """Return the estimator of the differences d_A."""
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
    return torch.expm1(_bounded(x)) + _tangent(x)


def safe_exp(x: Tensor) -> Tensor:
    """Return exp(x) up to EXPONENT_LIMIT and its tangent beyond."""
    return torch.exp(_bounded(x)) + _tangent(x)


def floor_logprob(logprob_A: Tensor) -> Tensor:
    """Return log-probs with LOGPROB_FLOOR for -inf, whose gradient is 0."""
    return torch.where(logprob_A == -torch.inf, LOGPROB_FLOOR, logprob_A)


def _bounded(x: Tensor) -> Tensor:
    # Not clamp: its gradient at NaN is 0, and a NaN loss would come with a finite gradient.
    return torch.where(x > EXPONENT_LIMIT, EXPONENT_LIMIT, x)


def _tangent(x: Tensor) -> Tensor:
    # A choice of its own, not x minus the bounded x: below the limit the slope must be 0, not exp(60) - exp(60).
    return torch.where(x > EXPONENT_LIMIT, x - EXPONENT_LIMIT, 0.0) * math.exp(EXPONENT_LIMIT)
