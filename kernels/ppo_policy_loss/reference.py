"""The PPO policy loss in plain PyTorch: differentiable, in fp32 (fp64 for fp64 inputs).

As every `reference.py` here: kernels are measured against it and the CPU runs it. Arguments arrive validated; shapes
and errors are documented on the public function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.statistics import masked_sums, to_float64, with_neutral
from ..kl_divergence.reference import kl_divergence, safe_exp, safe_expm1
from ..types import Moments, PolicyStats, PPOLoss
from ..validate import wide_dtype
from ..whitening.reference import whiten


def counts(coefficient) -> bool:
    """Whether a term with this coefficient is part of a loss; one on a device may be anything."""
    return isinstance(coefficient, Tensor) or coefficient != 0


def policy_token_loss(
    logprob_A: Tensor,
    entropy_A: Tensor | None,
    old_logprob_A: Tensor | None,
    advantage_A: Tensor,
    ref_logprob_A: Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef,
    kl_estimator: str,
    kl_gradient: str,
    entropy_coef,
    **_: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of each token and the terms that its statistics are made of."""
    old_A = logprob_A.detach() if old_logprob_A is None else old_logprob_A
    log_ratio_A = logprob_A - old_A
    ratio_A = safe_exp(log_ratio_A)
    plain_A = -advantage_A * ratio_A
    bounded_A = -advantage_A * ratio_A.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped_A = bounded_A > plain_A
    policy_A = torch.where(clipped_A, bounded_A, plain_A)
    dual_A = torch.zeros_like(clipped_A)
    if dual_clip is not None:
        ceiling_A = -advantage_A * dual_clip
        dual_A = (advantage_A < 0) & (policy_A > ceiling_A)
        policy_A = torch.where(dual_A, ceiling_A, policy_A)
    loss_A = policy_A
    ref_kl_A = torch.zeros_like(policy_A)
    if ref_logprob_A is not None:
        ref_kl_A = kl_divergence(logprob_A, ref_logprob_A, kl_estimator)
        if kl_gradient == "k2" and kl_estimator != "k2":
            # The gradient of E[k1] or E[k3] under a detached sample is not that of the KL; k2's is.
            slope_A = kl_divergence(logprob_A, ref_logprob_A, "k2")
            ref_kl_A = ref_kl_A.detach() + (slope_A - slope_A.detach())
        if counts(kl_coef):
            loss_A = loss_A + kl_coef * ref_kl_A
    if entropy_A is not None and counts(entropy_coef):
        loss_A = loss_A - entropy_coef * entropy_A
    return loss_A, {
        "policy": policy_A,
        "log_ratio": log_ratio_A,
        "ratio": ratio_A,
        "clipped": clipped_A,
        "dual": dual_A,
        "ref_kl": ref_kl_A,
    }


def ppo_policy_loss(
    logprob_A: Tensor,
    old_logprob_A: Tensor | None,
    advantage_A: Tensor,
    *,
    entropy_A: Tensor | None = None,
    ref_logprob_A: Tensor | None = None,
    mask_A: Tensor | None = None,
    weight_A: Tensor | None = None,
    normalizer,
    moments: Moments | None = None,
    shift_mean: bool = True,
    **terms,
) -> PPOLoss:
    dtype = wide_dtype(logprob_A, old_logprob_A, advantage_A)
    keep_A = torch.ones_like(logprob_A, dtype=torch.bool) if mask_A is None else mask_A != 0

    def kept(x_A):
        return None if x_A is None else torch.where(keep_A, x_A, 0).to(dtype)

    advantage_A = kept(advantage_A if moments is None else whiten(advantage_A, moments, shift_mean=shift_mean))
    logprob_A, old_A, entropy_A, ref_A = map(kept, (logprob_A, old_logprob_A, entropy_A, ref_logprob_A))
    weight_A = keep_A.to(dtype) if weight_A is None else kept(weight_A)
    loss_A, parts = policy_token_loss(logprob_A, entropy_A, old_A, advantage_A, ref_A, **terms)
    loss = (kept(loss_A) * weight_A).sum() / normalizer
    with torch.no_grad():
        stats = _policy_stats(keep_A, weight_A, loss_A, parts, logprob_A, entropy_A, advantage_A)
    return PPOLoss(loss.to(dtype), stats)


def _policy_stats(keep_A, weight_A, loss_A, parts, logprob_A, entropy_A, advantage_A) -> PolicyStats:
    ratio_A, log_ratio_A = parts["ratio"], parts["log_ratio"]
    columns = {
        "count": keep_A,
        "weight_sum": weight_A,
        "loss_sum": loss_A * weight_A,
        "policy_loss_sum": parts["policy"] * weight_A,
        "clipped_sum": parts["clipped"],
        "clipped_low": parts["clipped"] & (ratio_A < 1),
        "clipped_high": parts["clipped"] & (ratio_A > 1),
        "dual_clipped_sum": parts["dual"],
        "kl_old_new_sum": safe_expm1(log_ratio_A) - log_ratio_A,
        "ratio_sum": ratio_A,
        "entropy_sum": torch.zeros_like(loss_A) if entropy_A is None else entropy_A,
        "ref_kl_sum": parts["ref_kl"],
        "logprob_sum": logprob_A,
        "advantage_sum": advantage_A,
        "advantage_sq_sum": advantage_A * advantage_A,
    }
    extremes = {
        "ratio_min": with_neutral(ratio_A, keep_A, torch.inf).amin(),
        "ratio_max": with_neutral(ratio_A, keep_A, -torch.inf).amax(),
        "logprob_diff_abs_max": with_neutral(log_ratio_A.abs(), keep_A, 0.0).amax(),
    }
    return PolicyStats(**masked_sums(columns, keep_A), **to_float64(extremes))
