"""The PPO policy loss in plain PyTorch: differentiable, in fp32 (fp64 for fp64 inputs).

Kernels are measured against this `reference.py`, and the CPU runs it; so it is in every operation's folder. Arguments
arrive validated; shapes and errors are documented on the public function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.precision import widen
from ..common.statistics import masked_sums, neutralize_masked, to_float64
from ..kl_divergence.reference import floor_logprob, kl_divergence, safe_exp, safe_expm1
from ..stats import PolicyStats
from ..types import PPOLoss
from ..validate import wide_dtype
from ..whitening.reference import whiten
from .inputs import PolicyObjective, PolicyStreams

# Legend: A, actions of the packed stream; every stream and term is [A].


class PolicyTerms(NamedTuple):
    """Terms of the objective by token [A]; the statistics are sums of them."""

    loss: Tensor
    policy: Tensor
    log_ratio: Tensor
    ratio: Tensor
    clipped: Tensor
    dual_clipped: Tensor
    ref_kl: Tensor


def policy_terms(
    logprob_A: Tensor, entropy_A: Tensor | None, streams: PolicyStreams, objective: PolicyObjective
) -> PolicyTerms:
    """Return the objective of each token and its terms. The advantage is whitened already; the mask is not applied."""
    advantage_A, ref_logprob_A = streams.advantage_A, streams.ref_logprob_A
    # 1. Clipped or masked surrogate. On-policy the ratio is 1 and only its gradient matters. An old log-prob that is
    #    not finite makes loss and gradient NaN.
    logprob_A = floor_logprob(logprob_A)
    old_A = logprob_A.detach() if streams.old_logprob_A is None else streams.old_logprob_A
    old_A = torch.where(old_A.isfinite(), old_A, torch.nan)
    log_ratio_A = logprob_A - old_A
    ratio_A = safe_exp(log_ratio_A)
    unclipped_A = -advantage_A * ratio_A
    low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
    if objective.surrogate == "mask":
        clipped_A = (ratio_A < low) | (ratio_A > high)
        policy_A = torch.where(clipped_A, 0.0, unclipped_A)
    else:
        bounded_A = -advantage_A * ratio_A.clamp(low, high)
        clipped_A = bounded_A > unclipped_A
        policy_A = torch.where(clipped_A, bounded_A, unclipped_A)
    # 2. Dual clip: bounds the loss of negative advantages, whose ratio the clip leaves unbounded.
    dual_A = torch.zeros_like(clipped_A)
    if objective.dual_clip is not None:
        ceiling_A = -advantage_A * objective.dual_clip
        dual_A = (advantage_A < 0) & (policy_A > ceiling_A)
        policy_A = torch.where(dual_A, ceiling_A, policy_A)
    # 3. KL against the reference. It is computed for the statistics also if its coefficient is 0.
    loss_A = policy_A
    ref_kl_A = torch.zeros_like(policy_A)
    if ref_logprob_A is not None:
        ref_kl_A = kl_divergence(logprob_A, ref_logprob_A, objective.kl_estimator)
        if objective.kl_gradient == "k2" and objective.kl_estimator != "k2":
            # The gradient of E[k1] or E[k3] under a detached sample is not that of the KL; k2's is.
            k2_A = kl_divergence(logprob_A, ref_logprob_A, "k2")
            ref_kl_A = ref_kl_A.detach() + (k2_A - k2_A.detach())
        if objective.has_kl:
            loss_A = loss_A + objective.kl_coef * ref_kl_A
    # 4. Entropy bonus.
    if entropy_A is not None and objective.has_entropy:
        loss_A = loss_A - objective.entropy_coef * entropy_A
    return PolicyTerms(loss_A, policy_A, log_ratio_A, ratio_A, clipped_A, dual_A, ref_kl_A)


def ppo_policy_loss(
    logprob_A: Tensor,
    entropy_A: Tensor | None,
    streams: PolicyStreams,
    objective: PolicyObjective,
    normalizer: float | Tensor,
) -> PPOLoss:
    """Return the loss and its statistics; see the public function."""
    dtype = wide_dtype(logprob_A, streams.old_logprob_A, streams.advantage_A)
    keep_A = torch.ones_like(logprob_A, dtype=torch.bool) if streams.mask_A is None else streams.mask_A != 0

    def masked(x_A: Tensor) -> Tensor:
        # Select, do not multiply: 0 * NaN is NaN.
        return widen(torch.where(keep_A, x_A, 0), dtype)

    def masked_optional(x_A: Tensor | None) -> Tensor | None:
        return None if x_A is None else masked(x_A)

    # 1. Whiten, then mask every stream, so that masked entries reach neither value nor gradient.
    advantage_A = streams.advantage_A
    if objective.moments is not None:
        advantage_A = whiten(advantage_A, objective.moments, shift_mean=objective.shift_mean)
    advantage_A = masked(advantage_A)
    logprob_A, entropy_A = masked(logprob_A), masked_optional(entropy_A)
    weight_A = keep_A.to(dtype) if streams.weight_A is None else masked(streams.weight_A)
    wide = PolicyStreams(
        masked_optional(streams.old_logprob_A), advantage_A, masked_optional(streams.ref_logprob_A), keep_A, weight_A
    )
    # 2. Loss, and statistics of the same terms.
    terms = policy_terms(logprob_A, entropy_A, wide, objective)
    loss = (masked(terms.loss) * weight_A).sum() / normalizer
    with torch.no_grad():
        stats = _policy_stats(terms, logprob_A, entropy_A, advantage_A, weight_A, keep_A)
    return PPOLoss(loss.to(dtype), stats)


def _policy_stats(
    terms: PolicyTerms,
    logprob_A: Tensor,
    entropy_A: Tensor | None,
    advantage_A: Tensor,
    weight_A: Tensor,
    keep_A: Tensor,
) -> PolicyStats:
    columns = {
        "count": keep_A,
        "weight_sum": weight_A,
        "loss_sum": terms.loss * weight_A,
        "policy_loss_sum": terms.policy * weight_A,
        "clipped_sum": terms.clipped,
        "clipped_low": terms.clipped & (terms.ratio < 1),
        "clipped_high": terms.clipped & (terms.ratio > 1),
        "dual_clipped_sum": terms.dual_clipped,
        # k3 seen from the old policy: (ratio - 1) - log ratio, without cancellation near 1.
        "kl_old_new_sum": safe_expm1(terms.log_ratio) - terms.log_ratio,
        "ratio_sum": terms.ratio,
        "entropy_sum": torch.zeros_like(terms.loss) if entropy_A is None else entropy_A,
        "ref_kl_sum": terms.ref_kl,
        "logprob_sum": floor_logprob(logprob_A),
        "advantage_sum": advantage_A,
        "advantage_sq_sum": advantage_A * advantage_A,
    }
    extremes = {
        "ratio_min": neutralize_masked(terms.ratio, keep_A, torch.inf).amin(),
        "ratio_max": neutralize_masked(terms.ratio, keep_A, -torch.inf).amax(),
        "logprob_diff_abs_max": neutralize_masked(terms.log_ratio.abs(), keep_A, 0.0).amax(),
    }
    return PolicyStats(**masked_sums(columns, keep_A), **to_float64(extremes))
