"""The clipped surrogate of PPO on log-probs, with dual clip, KL and entropy terms."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import Moments, PPOLoss
from ..validate import check_objective


def ppo_policy_loss(
    logprob_A: Tensor,
    old_logprob_A: Tensor | None,
    advantage_A: Tensor,
    *,
    entropy_A: Tensor | None = None,
    ref_logprob_A: Tensor | None = None,
    mask_A: Tensor | None = None,
    weight_A: Tensor | None = None,
    normalizer: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k2",
    kl_gradient: str = "k2",
    entropy_coef: float | Tensor = 0.0,
    moments: Moments | None = None,
    shift_mean: bool = True,
) -> PPOLoss:
    """Sum over unmasked tokens of weight * (surrogate + kl_coef * kl - entropy_coef * entropy), over normalizer.

    surrogate = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(logprob - old_logprob) (Schulman et
    al. 2017); with dual_clip c it is at most -A c where A < 0 (Ye et al. 2020).
    All *_A: [A] floating (mask_A: anything, 0 is masked). old_logprob_A None: on-policy, the detached logprob_A.
    moments whiten the advantage on the fly. kl has the value of kl_estimator against ref_logprob_A and, with
    kl_gradient="k2", the gradient of k2; "raw" takes the estimator's own. normalizer: number > 0 or 0-dim tensor.
    Returns PPOLoss(loss, stats), differentiable in logprob_A and entropy_A. Raises TypeError or ValueError naming the
    argument; a kl_coef without ref_logprob_A and an entropy_coef without entropy_A are refused.
    """
    op = "ppo_policy_loss"
    validate.check_floating(op, "logprob_A", logprob_A, (None,))
    if entropy_A is not None:
        validate.check_floating(op, "entropy_A", entropy_A, tuple(logprob_A.shape), logprob_A)
    elif isinstance(entropy_coef, Tensor) or entropy_coef != 0:
        raise ValueError(f"{op}: entropy_A must be given when entropy_coef is {entropy_coef}, got None")
    terms = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "kl_gradient": kl_gradient,
        "entropy_coef": entropy_coef,
    }
    streams = check_objective(
        op, logprob_A, old_logprob_A, advantage_A, ref_logprob_A, mask_A, weight_A, normalizer, moments, terms
    )
    old_logprob_A, advantage_A, ref_logprob_A, weight_A = streams
    return select(op, logprob_A, old_logprob_A, advantage_A)(
        logprob_A,
        old_logprob_A,
        advantage_A,
        entropy_A=entropy_A,
        ref_logprob_A=ref_logprob_A,
        mask_A=mask_A,
        weight_A=weight_A,
        normalizer=normalizer,
        moments=moments,
        shift_mean=shift_mean,
        **terms,
    )
