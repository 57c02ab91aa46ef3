"""The plain PyTorch meaning of the token-level operations: differentiable, in fp32 (fp64 for fp64 inputs).

Kernels are measured against this file and the CPU runs it. Its neighbours hold the rest: reference_rows (a row of
logits spread over ranks), reference_linear (log-probs and losses without a logit matrix), reference_gae and
reference_sampling. Arguments arrive validated; shapes and errors are documented on the public functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import vocab_rows as reference_rows
from ..types import Moments, PolicyStats, PPOLoss, TokenLogprobs, ValueLoss, ValueStats, VocabShard
from ..validate import IGNORED_LABEL, wide_dtype

# exp() continues along its tangent beyond this exponent, so that neither it nor 0 * exp() leaves fp32's range.
EXPONENT_LIMIT = 60.0


def token_logprobs(
    logits_AV: Tensor,
    labels_A: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,  # an allowance, which autograd has no use for
) -> TokenLogprobs:
    if shard is not None and shard.group is not None:
        return reference_rows.token_logprobs(logits_AV, labels_A, temperature, entropy, shard)
    ignored_A = labels_A == IGNORED_LABEL
    if shard is not None:
        logits_AV = logits_AV[:, : shard.valid]
    z_AV = logits_AV.to(wide_dtype(logits_AV))
    if temperature != 1.0:
        z_AV = z_AV / temperature
    if labels_A.device.type != "cpu" or ignored_A.any():
        # Zeroing the row itself, not only its result, keeps a NaN row out of the gradient (0 * NaN is NaN).
        z_AV = z_AV.masked_fill(ignored_A[:, None], 0.0)
    logp_AV = torch.log_softmax(z_AV, dim=-1)
    label_A = labels_A.long().clamp(0, z_AV.shape[1] - 1)
    logprob_A = logp_AV.gather(1, label_A[:, None]).squeeze(1)
    logprob_A = torch.where(labels_A < z_AV.shape[1], logprob_A, -torch.inf).masked_fill(ignored_A, 0.0)
    if not entropy:
        return TokenLogprobs(logprob_A, None)
    # p log p -> 0 as p -> 0; clamping log p (where p is 0 anyway) keeps 0 * -inf out of both directions.
    entropy_A = -(logp_AV.exp() * logp_AV.clamp(min=-1e4)).sum(-1)
    return TokenLogprobs(logprob_A, entropy_A.masked_fill(ignored_A, 0.0))


def kl_divergence(logprob_A: Tensor, ref_logprob_A: Tensor, estimator: str) -> Tensor:
    dtype = wide_dtype(logprob_A, ref_logprob_A)
    d_A = logprob_A.to(dtype) - ref_logprob_A.to(dtype)
    if estimator == "k1":
        return d_A
    if estimator == "k2":
        return 0.5 * d_A * d_A
    if estimator == "k3":
        return safe_expm1(-d_A) + d_A
    return d_A.abs()


def safe_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 up to EXPONENT_LIMIT and its tangent beyond: finite, increasing, with a gradient of the right sign."""
    return torch.expm1(x.clamp(max=EXPONENT_LIMIT)) + _tangent(x)


def safe_exp(x: Tensor) -> Tensor:
    """exp(x), continued likewise."""
    return torch.exp(x.clamp(max=EXPONENT_LIMIT)) + _tangent(x)


def _tangent(x: Tensor) -> Tensor:
    # Its own clamp, and no difference of x and a clamped x: below the limit the slope must be 0, not exp(60) - exp(60).
    return (x - EXPONENT_LIMIT).clamp(min=0) * math.exp(EXPONENT_LIMIT)


def whiten(x: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    dtype = wide_dtype(x)
    mean, scale = moments.mean.to(dtype), torch.rsqrt(moments.variance + eps).to(dtype)
    white = (x.to(dtype) - mean) * scale
    return white if shift_mean else white + mean


def masked_moments(x: Tensor, mask: Tensor | None = None, group=None) -> Moments:
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    wide = torch.where(keep, x, 0).to(torch.float64)
    count = keep.sum().to(torch.float64)
    mean = wide.sum() / count.clamp(min=1)
    m2 = torch.where(keep, wide - mean, 0).square().sum()
    mine = Moments(count, mean, m2)
    return mine if group is None else mine.reduce(group)


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
        "ratio_min": _extreme(ratio_A, keep_A, torch.inf).amin(),
        "ratio_max": _extreme(ratio_A, keep_A, -torch.inf).amax(),
        "logprob_diff_abs_max": _extreme(log_ratio_A.abs(), keep_A, 0.0).amax(),
    }
    return PolicyStats(**_masked_sums(columns, keep_A), **_wide(extremes))


def value_loss(
    value_A: Tensor,
    old_value_A: Tensor | None,
    return_A: Tensor,
    *,
    clip: float | None,
    normalizer,
    mask_A: Tensor | None = None,
    weight_A: Tensor | None = None,
) -> ValueLoss:
    dtype = wide_dtype(value_A, old_value_A, return_A)
    keep_A = torch.ones_like(value_A, dtype=torch.bool) if mask_A is None else mask_A != 0

    def kept(x_A):
        return torch.where(keep_A, x_A, 0).to(dtype)

    value_A, return_A = kept(value_A), kept(return_A)
    weight_A = keep_A.to(dtype) if weight_A is None else kept(weight_A)
    error_A = return_A - value_A
    worst_A = error_A.square()
    clipped_A = torch.zeros_like(keep_A)
    if clip is not None:
        old_A = kept(old_value_A)
        bounded_A = (old_A + (value_A - old_A).clamp(-clip, clip) - return_A).square()
        clipped_A = bounded_A > worst_A
        worst_A = torch.where(clipped_A, bounded_A, worst_A)
    loss_A = 0.5 * worst_A * weight_A
    loss = loss_A.sum() / normalizer
    with torch.no_grad():
        columns = {
            "count": keep_A,
            "weight_sum": weight_A,
            "loss_sum": loss_A,
            "clipped_sum": clipped_A,
            "value_sum": value_A,
            "value_sq_sum": value_A.square(),
            "return_sum": return_A,
            "return_sq_sum": return_A.square(),
            "error_sum": error_A,
            "error_sq_sum": error_A.square(),
        }
        extremes = {
            "value_min": _extreme(value_A, keep_A, torch.inf).amin(),
            "value_max": _extreme(value_A, keep_A, -torch.inf).amax(),
        }
        stats = ValueStats(**_masked_sums(columns, keep_A), **_wide(extremes))
    return ValueLoss(loss.to(dtype), stats)


def _masked_sums(columns: dict[str, Tensor], keep_A: Tensor) -> dict[str, Tensor]:
    table = torch.stack([c.to(torch.float64) for c in columns.values()])
    sums = torch.where(keep_A, table, 0).sum(dim=1)
    return dict(zip(columns, sums.unbind(), strict=True))


def _extreme(x_A: Tensor, keep_A: Tensor, empty: float) -> Tensor:
    """x_A with masked entries neutral for a minimum or maximum, and one more so that an empty stream has an answer."""
    return torch.cat([torch.where(keep_A, x_A, empty), x_A.new_full((1,), empty)])


def _wide(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.float64) for name, value in values.items()}
