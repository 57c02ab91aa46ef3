"""Per-token estimators of the divergence between the policy and a reference."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select


def kl_divergence(logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
    """Return an estimate of KL(policy || reference) from one sampled token each.

    With d = logprob - ref_logprob:

        k1 = d
        k2 = d^2 / 2
        k3 = exp(-d) - 1 + d
        abs = |d|

    Source: Schulman, "Approximating KL Divergence", 2020 (joschu.net/blog/kl-approx.html). k3 continues along its
    tangent where exp(-d) would leave fp32's range (-d > 60). A log-prob of -inf enters d as -1e4, as a constant. The
    result is differentiable in both log-probs; gradients in fp16 saturate at its largest number.

    Args:
        logprob_A: Floating, any shape: log-probs in nats under the policy, which sampled the tokens.
        ref_logprob_A: Floating, the shape of logprob_A: log-probs under the reference.
        estimator: "k1", "k2", "k3" or "abs".

    Returns:
        Tensor of the same shape, nats, fp32 (fp64 if an input is).

    Raises:
        TypeError: An input is not a floating tensor.
        ValueError: The shapes or devices differ, or the estimator is unknown.
    """
    op = "kl_divergence"
    validate.check_floating(op, "logprob_A", logprob_A, (None,) * getattr(logprob_A, "ndim", 1))
    validate.check_floating(op, "ref_logprob_A", ref_logprob_A, tuple(logprob_A.shape), logprob_A)
    validate.check_choice(op, "estimator", estimator, validate.KL_ESTIMATORS)
    return select(op, logprob_A, ref_logprob_A)(logprob_A, ref_logprob_A, estimator)
