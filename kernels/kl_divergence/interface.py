"""Per-token estimators of the divergence between the policy and a reference."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select


def kl_divergence(logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) estimated from one sampled token each, with d = logprob - ref_logprob (Schulman 2020).

    k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d; abs = |d|. k3 continues along its tangent where exp(-d) would leave
    fp32's range (-d > 60). logprob_A, ref_logprob_A: floating, equal shapes. Returns fp32 (fp64 if either is fp64).
    Raises ValueError for another estimator or shapes that differ, TypeError for a dtype that is not floating.
    """
    op = "kl_divergence"
    validate.check_floating(op, "logprob_A", logprob_A, (None,) * getattr(logprob_A, "ndim", 1))
    validate.check_floating(op, "ref_logprob_A", ref_logprob_A, tuple(logprob_A.shape), logprob_A)
    validate.check_choice(op, "estimator", estimator, validate.KL_ESTIMATORS)
    return select(op, logprob_A, ref_logprob_A)(logprob_A, ref_logprob_A, estimator)
