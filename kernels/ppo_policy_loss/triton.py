"""The PPO policy loss in Triton: loss, statistics and both gradients of every token in one launch, without atomics.

Each program writes the statistics of its tokens to its own row. A second launch of one program adds those rows in
order, in fp64, and divides the loss. So the bits repeat, the host reads nothing back, and backward only multiplies by
the upstream scalar. The linear loss reads its token gradients from the same launch.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.streams import mask_bytes
from ..common.triton import (
    AttachTokenGradients,
    bounded_exp,
    exp_minus_tangent,
    floor_logprob,
    fold_statistics,
    kl_estimate,
    load_scalar,
    load_stream,
    set_column,
    value_and_pointer,
)
from ..common.vocab_rows import TokenGrads
from ..dispatch import log_launch
from ..kl_divergence.reference import EXPONENT_LIMIT, LOGPROB_FLOOR
from ..stats import PolicyStats
from ..types import PPOLoss
from .inputs import PolicyObjective, PolicyStreams

# Legend
#   A         actions of the packed stream; every stream is [A]
#   *_size    extent of an optional stream: A, or 0 if it is absent
#   BLOCK     tokens of one program
#   partials  [programs, WIDTH] fp32, one row of statistics per program, columns in the order of PolicyStats

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUMS = sum("merge" not in f.metadata for f in fields(PolicyStats))
COLUMNS = len(fields(PolicyStats))
# Operations per token, for the declared cost: ratio, clips, both gradients, KL and the statistics.
FLOPS = 80


@triton.jit
def kl_to_reference(d, ESTIMATOR: tl.constexpr, RAW: tl.constexpr, LIMIT: tl.constexpr):
    """Return (value, slope) of the estimator at d = log p - log p_ref; the slope is that of k2 unless RAW."""
    value = kl_estimate(d, ESTIMATOR, LIMIT)
    slope = d
    if RAW:
        if ESTIMATOR == "k1":
            slope = tl.zeros_like(d) + 1.0
        elif ESTIMATOR == "k3":
            # No series near 0: this slope is added to the surrogate's, beside which the lost digits are nothing.
            slope = 1.0 - tl.exp(tl.where(-d > LIMIT, LIMIT, -d))
        elif ESTIMATOR == "abs":
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
    MASKED: tl.constexpr,
    LIMIT: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write gradients by log-prob and entropy, and one row of statistics, for BLOCK tokens."""
    # 1. Load the streams. An absent one has size 0, so its mask is empty and its pointer is never read.
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    keep = inside & (tl.load(mask_ptr + index, mask=index < mask_size, other=1) != 0)
    raw_logprob = load_stream(logprob_ptr, index, keep)
    logprob = floor_logprob(raw_logprob, FLOOR)
    # An old log-prob that is not finite makes loss and gradient NaN.
    old = load_stream(old_ptr, index, keep & (index < old_size))
    old = tl.where(tl.abs(old) < float("inf"), old, float("nan"))
    # Without an old log-prob the step is on-policy: the ratio is 1.
    old = tl.where(index < old_size, old, logprob)
    entropy = load_stream(entropy_ptr, index, keep & (index < entropy_size))
    weight = load_stream(weight_ptr, index, keep & (index < weight_size))
    weight = tl.where(index < weight_size, weight, tl.where(keep, 1.0, 0.0))
    advantage = load_stream(advantage_ptr, index, keep)

    # 2. Whiten the advantage. The variance is a quotient of fp64 sums and is rounded after the root.
    if has_moments != 0:
        mean = tl.load(mean_ptr).to(tl.float32)
        variance = tl.load(m2_ptr).to(tl.float64) / tl.maximum(tl.load(count_ptr).to(tl.float64), 1.0)
        white = (advantage - mean) * (1.0 / tl.sqrt(variance + 1e-8)).to(tl.float32)
        # Masked entries return to 0: whitening would shift them to -mean.
        advantage = tl.where(keep, white + (1 - shift_mean) * mean, 0.0)

    # 3. Clipped or masked surrogate, its dual clip, and the slope by log-prob: 0 where a clip or the mask is active.
    log_ratio = logprob - old
    ratio = bounded_exp(log_ratio, LIMIT)
    unclipped = -advantage * ratio
    if MASKED:
        clipped = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
        policy = tl.where(clipped, 0.0, unclipped)
        slope = unclipped  # a ratio beyond the exponent's limit is masked
    else:
        bounded = -advantage * tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
        clipped = bounded > unclipped
        policy = tl.where(clipped, bounded, unclipped)
        slope = -advantage * tl.exp(tl.where(log_ratio > LIMIT, LIMIT, log_ratio))
    ceiling = -advantage * dual_clip
    dual = (advantage < 0.0) & (policy > ceiling)
    policy = tl.where(dual, ceiling, policy)
    slope = tl.where(clipped | dual, 0.0, slope)

    # 4. KL against the reference and entropy.
    has_ref = keep & (index < ref_size)
    ref = floor_logprob(load_stream(ref_ptr, index, has_ref), FLOOR)
    kl, kl_slope = kl_to_reference(logprob - ref, ESTIMATOR, RAW, LIMIT)
    kl, kl_slope = tl.where(has_ref, kl, 0.0), tl.where(has_ref, kl_slope, 0.0)
    entropy_weight = load_scalar(entropy_coef, ENTROPY_POINTER)
    kl_weight = load_scalar(kl_coef, KL_POINTER)
    loss = policy + kl_weight * kl - entropy_weight * entropy

    # 5. Gradients. Masked tokens get a 0, not the buffer's content; a log-prob of -inf is a constant.
    token_scale = weight / load_scalar(normalizer, NORMALIZER_POINTER)
    grad = tl.where(raw_logprob == -float("inf"), 0.0, (slope + kl_weight * kl_slope) * token_scale)
    tl.store(grad_logprob_ptr + index, tl.where(keep, grad, 0.0), mask=inside)
    tl.store(grad_entropy_ptr + index, tl.where(keep, -entropy_weight * token_scale, 0.0), mask=index < entropy_size)

    # 6. Statistics, one column for each field of PolicyStats: 15 sums, a minimum and two maxima.
    one = tl.where(keep, 1.0, 0.0)
    clipped = clipped & keep
    row = tl.zeros((WIDTH,), tl.float32)
    row = set_column(row, tl.sum(one), 0, WIDTH)
    row = set_column(row, tl.sum(weight), 1, WIDTH)
    row = set_column(row, tl.sum(loss * weight), 2, WIDTH)
    row = set_column(row, tl.sum(policy * weight), 3, WIDTH)
    row = set_column(row, tl.sum(tl.where(clipped, 1.0, 0.0)), 4, WIDTH)
    row = set_column(row, tl.sum(tl.where(clipped & (ratio < 1.0), 1.0, 0.0)), 5, WIDTH)
    row = set_column(row, tl.sum(tl.where(clipped & (ratio > 1.0), 1.0, 0.0)), 6, WIDTH)
    row = set_column(row, tl.sum(tl.where(dual & keep, 1.0, 0.0)), 7, WIDTH)
    row = set_column(row, tl.sum(exp_minus_tangent(log_ratio, LIMIT)), 8, WIDTH)
    row = set_column(row, tl.sum(ratio * one), 9, WIDTH)
    row = set_column(row, tl.sum(entropy), 10, WIDTH)
    row = set_column(row, tl.sum(kl), 11, WIDTH)
    row = set_column(row, tl.sum(logprob), 12, WIDTH)
    row = set_column(row, tl.sum(advantage), 13, WIDTH)
    row = set_column(row, tl.sum(advantage * advantage), 14, WIDTH)
    row = set_column(row, tl.min(tl.where(keep, ratio, float("inf"))), 15, WIDTH)
    row = set_column(row, tl.max(tl.where(keep, ratio, float("-inf"))), 16, WIDTH)
    row = set_column(row, tl.max(tl.where(keep, tl.abs(log_ratio), 0.0)), 17, WIDTH)
    tl.store(partials_ptr + block * WIDTH + tl.arange(0, WIDTH), row)


def policy_launch(
    logprob_A: Tensor,
    entropy_A: Tensor | None,
    streams: PolicyStreams,
    objective: PolicyObjective,
    normalizer: float | Tensor,
) -> tuple[TokenGrads, Tensor]:
    """Return (d loss / d log-prob and d loss / d entropy, the programs' statistics) in one launch."""
    # 1. Allocate.
    size, device = logprob_A.shape[0], logprob_A.device
    grad_logprob_A = torch.empty(size, dtype=torch.float32, device=device)
    grad_entropy_A = None if entropy_A is None else torch.empty_like(grad_logprob_A)
    width = triton.next_power_of_2(COLUMNS)
    partials = torch.empty(triton.cdiv(size, BLOCK), width, dtype=torch.float32, device=device)
    # 2. Launch; an empty stream has no program, and `fold_statistics` returns zeros for it.
    if size:
        advantage_A, mask_A, moments = streams.advantage_A, streams.mask_A, objective.moments
        optional = [streams.old_logprob_A, advantage_A, entropy_A, streams.ref_logprob_A]
        _policy_step(
            logprob_A.detach().contiguous(),
            *(None if x is None else x.detach().contiguous() for x in optional),
            None if mask_A is None else mask_bytes(mask_A),
            None if streams.weight_A is None else streams.weight_A.detach().contiguous(),
            *((None,) * 3 if moments is None else (moments.count, moments.mean, moments.m2)),
            grad_logprob_A,
            grad_entropy_A,
            partials,
            *value_and_pointer(normalizer),
            *value_and_pointer(objective.kl_coef),
            *value_and_pointer(objective.entropy_coef),
            float(objective.clip_low),
            float(objective.clip_high),
            math.inf if objective.dual_clip is None else float(objective.dual_clip),
            objective.kl_estimator,
            objective.kl_gradient == "raw",
            bool(objective.shift_mean),
            objective.surrogate == "mask",
        )
    return TokenGrads(grad_logprob_A, grad_entropy_A), partials


def _policy_cost(
    logprob_A: Tensor,
    old_A: Tensor | None,
    advantage_A: Tensor,
    entropy_A: Tensor | None,
    ref_A: Tensor | None,
    mask_A: Tensor | None,
    weight_A: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    grad_logprob_A: Tensor,
    grad_entropy_A: Tensor | None,
    partials: Tensor,
    normalizer: float,
    normalizer_ptr: Tensor | None,
    kl_coef: float,
    kl_coef_ptr: Tensor | None,
    entropy_coef: float,
    entropy_coef_ptr: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    estimator: str,
    raw: bool,
    shift_mean: bool,
    masked: bool,
) -> Cost:
    streams = [logprob_A, old_A, advantage_A, entropy_A, ref_A, mask_A, weight_A]
    numbers = [count, mean, m2, normalizer_ptr, kl_coef_ptr, entropy_coef_ptr]
    return Cost.of_pass(streams + numbers, [grad_logprob_A, grad_entropy_A, partials], FLOPS * logprob_A.numel())


@device_operator(
    "ppo_policy_loss(Tensor logprob, Tensor? old, Tensor advantage, Tensor? entropy, Tensor? ref, Tensor? mask, "
    "Tensor? weight, Tensor? count, Tensor? mean, Tensor? m2, Tensor(a!) grad_logprob, Tensor(b!)? grad_entropy, "
    "Tensor(c!) partials, float normalizer, Tensor? normalizer_ptr, float kl_coef, Tensor? kl_coef_ptr, "
    "float entropy_coef, Tensor? entropy_coef_ptr, float clip_low, float clip_high, float dual_clip, str estimator, "
    "bool raw, bool shift_mean, bool masked)",
    _policy_cost,
)
def _policy_step(
    logprob_A: Tensor,
    old_A: Tensor | None,
    advantage_A: Tensor,
    entropy_A: Tensor | None,
    ref_A: Tensor | None,
    mask_A: Tensor | None,
    weight_A: Tensor | None,
    count: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    grad_logprob_A: Tensor,
    grad_entropy_A: Tensor | None,
    partials: Tensor,
    normalizer: float,
    normalizer_ptr: Tensor | None,
    kl_coef: float,
    kl_coef_ptr: Tensor | None,
    entropy_coef: float,
    entropy_coef_ptr: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    estimator: str,
    raw: bool,
    shift_mean: bool,
    masked: bool,
) -> None:
    # An absent stream is replaced by the log-probs and gets size 0, so that one binary serves all combinations.
    size, optional = logprob_A.shape[0], (old_A, entropy_A, ref_A, mask_A, weight_A)
    old, entropy, ref, mask, weight = (logprob_A if x is None else x for x in optional)
    statistics = (logprob_A,) * 3 if count is None else (count, mean, m2)
    with torch.cuda.device_of(logprob_A):
        log_launch("ppo_policy_loss", "triton")
        ppo_policy_loss_kernel[(partials.shape[0],)](
            logprob_A,
            old,
            advantage_A,
            entropy,
            ref,
            mask,
            weight,
            *statistics,
            grad_logprob_A,
            grad_logprob_A if grad_entropy_A is None else grad_entropy_A,
            partials,
            size,
            *(0 if x is None else size for x in optional),
            int(count is not None),
            int(shift_mean),
            normalizer if normalizer_ptr is None else normalizer_ptr,
            kl_coef if kl_coef_ptr is None else kl_coef_ptr,
            entropy_coef if entropy_coef_ptr is None else entropy_coef_ptr,
            clip_low,
            clip_high,
            dual_clip,
            NORMALIZER_POINTER=normalizer_ptr is not None,
            KL_POINTER=kl_coef_ptr is not None,
            ENTROPY_POINTER=entropy_coef_ptr is not None,
            ESTIMATOR=estimator,
            RAW=raw,
            MASKED=masked,
            LIMIT=EXPONENT_LIMIT,
            FLOOR=LOGPROB_FLOOR,
            WIDTH=partials.shape[1],
            BLOCK=BLOCK,
            **OPTIONS,
        )


def ppo_policy_loss(
    logprob_A: Tensor,
    entropy_A: Tensor | None,
    streams: PolicyStreams,
    objective: PolicyObjective,
    normalizer: float | Tensor,
) -> PPOLoss:
    """Return the loss and its statistics; see the public function."""
    grads, partials = policy_launch(logprob_A, entropy_A, streams, objective, normalizer)
    stats, loss = fold_statistics(partials, normalizer, SUMS)
    values = stats[:COLUMNS].unbind()
    if logprob_A.shape[0] == 0:
        # The last column is a maximum of absolute values: 0 for an empty stream, not -inf.
        values = (*values[:-1], values[-1].clamp(min=0.0))
    result = PolicyStats(**{f.name: x for f, x in zip(fields(PolicyStats), values, strict=True)})
    pairs = [logprob_A, grads.logprob]
    if entropy_A is not None and grads.entropy is not None and objective.has_entropy:
        pairs += [entropy_A, grads.entropy]
    return PPOLoss(AttachTokenGradients.apply("ppo_policy_loss", loss, *pairs), result)
