"""The PPO policy loss in Triton: loss, statistics and both gradients of every token in one launch, nothing atomic.

Each program writes the statistics of its tokens to a row of its own; a second launch of one program adds those rows in
order, in fp64, and divides the loss. So the bits repeat, nothing is read back by the host, and backward only multiplies
by the upstream scalar. The linear loss reads its token gradients from the same launch.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import (
    AttachTokenGradients,
    bounded_exp,
    bytes_of,
    column_of,
    exp_minus_tangent,
    fold,
    on_device,
    scalar,
    stream,
)
from ..dispatch import log_launch
from ..kl_divergence.reference import EXPONENT_LIMIT
from ..types import PolicyStats, PPOLoss
from .reference import counts

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUMS = sum("merge" not in f.metadata for f in fields(PolicyStats))
COLUMNS = len(fields(PolicyStats))


@triton.jit
def kl_to_reference(d, ESTIMATOR: tl.constexpr, RAW: tl.constexpr, LIMIT: tl.constexpr):
    """(value, slope) of the estimator at d = log p - log p_ref; the slope is that of k2 unless RAW."""
    slope = d
    if ESTIMATOR == "k1":
        value = d
        if RAW:
            slope = tl.zeros_like(d) + 1.0
    elif ESTIMATOR == "k2":
        value = 0.5 * d * d
    elif ESTIMATOR == "k3":
        value = exp_minus_tangent(-d, LIMIT)
        if RAW:
            slope = 1.0 - tl.exp(tl.minimum(-d, LIMIT))
    else:
        value = tl.abs(d)
        if RAW:
            slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    return value, slope


@triton.jit
def ppo_policy_loss_kernel(
    logprob_ptr,
    old_ptr,
    advantage_ptr,
    entropy_ptr,
    ref_ptr,
    mask_ptr,
    weight_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    partials_ptr,
    size,
    old_size,
    entropy_size,
    ref_size,
    mask_size,
    weight_size,
    has_moments,
    shift_mean,
    normalizer,
    kl_coef,
    entropy_coef,
    clip_low,
    clip_high,
    dual_clip,
    NORMALIZER_POINTER: tl.constexpr,
    KL_POINTER: tl.constexpr,
    ENTROPY_POINTER: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    RAW: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    # An optional stream has `size` entries or none: what lies beyond its end is not there.
    keep = inside & (tl.load(mask_ptr + index, mask=index < mask_size, other=1) != 0)
    logprob = stream(logprob_ptr, index, keep)
    old = tl.where(index < old_size, stream(old_ptr, index, keep & (index < old_size)), logprob)
    entropy = stream(entropy_ptr, index, keep & (index < entropy_size))
    weight = stream(weight_ptr, index, keep & (index < weight_size))
    weight = tl.where(index < weight_size, weight, tl.where(keep, 1.0, 0.0))
    advantage = stream(advantage_ptr, index, keep)
    if has_moments != 0:
        mean = tl.load(mean_ptr).to(tl.float32)
        variance = tl.load(m2_ptr).to(tl.float64) / tl.maximum(tl.load(count_ptr).to(tl.float64), 1.0)
        white = (advantage - mean) * (1.0 / tl.sqrt(variance + 1e-8)).to(tl.float32)
        advantage = tl.where(keep, white + (1 - shift_mean) * mean, 0.0)

    log_ratio = logprob - old
    ratio = bounded_exp(log_ratio, LIMIT)
    plain = -advantage * ratio
    bounded = -advantage * tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    clipped = bounded > plain
    policy = tl.where(clipped, bounded, plain)
    ceiling = -advantage * dual_clip
    dual = (advantage < 0.0) & (policy > ceiling)
    policy = tl.where(dual, ceiling, policy)
    slope = tl.where(clipped | dual, 0.0, -advantage * tl.exp(tl.minimum(log_ratio, LIMIT)))
    referred = keep & (index < ref_size)
    kl, kl_slope = kl_to_reference(logprob - stream(ref_ptr, index, referred), ESTIMATOR, RAW, LIMIT)
    kl, kl_slope = tl.where(referred, kl, 0.0), tl.where(referred, kl_slope, 0.0)
    entropy_weight = scalar(entropy_coef, ENTROPY_POINTER)
    kl_weight = scalar(kl_coef, KL_POINTER)
    loss = policy + kl_weight * kl - entropy_weight * entropy

    share = weight / scalar(normalizer, NORMALIZER_POINTER)
    grad = (slope + kl_weight * kl_slope) * share
    tl.store(grad_logprob_ptr + index, tl.where(keep, grad, 0.0), mask=inside)
    tl.store(grad_entropy_ptr + index, tl.where(keep, -entropy_weight * share, 0.0), mask=index < entropy_size)

    one = tl.where(keep, 1.0, 0.0)
    cut = clipped & keep
    row = tl.zeros((WIDTH,), tl.float32)
    row = column_of(row, tl.sum(one), 0, WIDTH)
    row = column_of(row, tl.sum(weight), 1, WIDTH)
    row = column_of(row, tl.sum(loss * weight), 2, WIDTH)
    row = column_of(row, tl.sum(policy * weight), 3, WIDTH)
    row = column_of(row, tl.sum(tl.where(cut, 1.0, 0.0)), 4, WIDTH)
    row = column_of(row, tl.sum(tl.where(cut & (ratio < 1.0), 1.0, 0.0)), 5, WIDTH)
    row = column_of(row, tl.sum(tl.where(cut & (ratio > 1.0), 1.0, 0.0)), 6, WIDTH)
    row = column_of(row, tl.sum(tl.where(dual & keep, 1.0, 0.0)), 7, WIDTH)
    row = column_of(row, tl.sum(exp_minus_tangent(log_ratio, LIMIT)), 8, WIDTH)
    row = column_of(row, tl.sum(ratio * one), 9, WIDTH)
    row = column_of(row, tl.sum(entropy), 10, WIDTH)
    row = column_of(row, tl.sum(kl), 11, WIDTH)
    row = column_of(row, tl.sum(logprob), 12, WIDTH)
    row = column_of(row, tl.sum(advantage), 13, WIDTH)
    row = column_of(row, tl.sum(advantage * advantage), 14, WIDTH)
    row = column_of(row, tl.min(tl.where(keep, ratio, float("inf"))), 15, WIDTH)
    row = column_of(row, tl.max(tl.where(keep, ratio, float("-inf"))), 16, WIDTH)
    row = column_of(row, tl.max(tl.where(keep, tl.abs(log_ratio), 0.0)), 17, WIDTH)
    tl.store(partials_ptr + block * WIDTH + tl.arange(0, WIDTH), row)


def policy_launch(
    logprob_A: Tensor,
    old_A: Tensor | None,
    advantage_A: Tensor,
    entropy_A: Tensor | None,
    ref_A: Tensor | None,
    mask_A: Tensor | None,
    weight_A: Tensor | None,
    *,
    normalizer,
    moments,
    shift_mean: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef,
    kl_estimator: str,
    kl_gradient: str,
    entropy_coef,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d loss / d log-prob [A], d loss / d entropy [A], the programs' statistics) in one launch."""
    size, device = logprob_A.shape[0], logprob_A.device
    grad_logprob_A = torch.empty(size, dtype=torch.float32, device=device)
    grad_entropy_A = torch.empty_like(grad_logprob_A) if entropy_A is not None else grad_logprob_A
    width = triton.next_power_of_2(COLUMNS)
    partials = torch.empty(triton.cdiv(size, BLOCK), width, dtype=torch.float32, device=device)
    logprob_A = logprob_A.detach().contiguous()
    optional = [old_A, entropy_A, ref_A, mask_A, weight_A]
    old, entropy, ref, mask, weight = (logprob_A if x is None else x.detach().contiguous() for x in optional)
    counted = (logprob_A,) * 3 if moments is None else (moments.count, moments.mean, moments.m2)
    if size:
        with torch.cuda.device_of(logprob_A):
            log_launch("ppo_policy_loss", "triton")
            ppo_policy_loss_kernel[(partials.shape[0],)](
                logprob_A,
                old,
                advantage_A.detach().contiguous(),
                entropy,
                ref,
                mask if mask_A is None else bytes_of(mask),
                weight,
                *counted,
                grad_logprob_A,
                grad_entropy_A,
                partials,
                size,
                *(0 if x is None else size for x in (old_A, entropy_A, ref_A, mask_A, weight_A)),
                int(moments is not None),
                int(shift_mean),
                on_device(normalizer),
                on_device(kl_coef),
                on_device(entropy_coef),
                clip_low,
                clip_high,
                math.inf if dual_clip is None else float(dual_clip),
                NORMALIZER_POINTER=isinstance(normalizer, Tensor),
                KL_POINTER=isinstance(kl_coef, Tensor),
                ENTROPY_POINTER=isinstance(entropy_coef, Tensor),
                ESTIMATOR=kl_estimator,
                RAW=kl_gradient == "raw",
                LIMIT=EXPONENT_LIMIT,
                WIDTH=width,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return grad_logprob_A, grad_entropy_A, partials


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
    **options,
) -> PPOLoss:
    streams = (logprob_A, old_logprob_A, advantage_A, entropy_A, ref_logprob_A, mask_A, weight_A)
    grad_logprob_A, grad_entropy_A, partials = policy_launch(*streams, normalizer=normalizer, **options)
    stats, loss = fold(partials, normalizer, SUMS)
    values = stats[:COLUMNS].unbind()
    if logprob_A.shape[0] == 0:
        values = (*values[:-1], values[-1].clamp(min=0.0))  # no largest difference: 0, not -inf
    result = PolicyStats(**{f.name: x for f, x in zip(fields(PolicyStats), values, strict=True)})
    pairs = [logprob_A, grad_logprob_A]
    if entropy_A is not None and counts(options["entropy_coef"]):
        pairs += [entropy_A, grad_entropy_A]
    return PPOLoss(AttachTokenGradients.apply("ppo_policy_loss", loss, *pairs), result)
