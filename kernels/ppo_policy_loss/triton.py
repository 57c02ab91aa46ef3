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

from ..dispatch import note_launch
from ..types import PolicyStats, PPOLoss
from ..validate import single_backward
from .reference import EXPONENT_LIMIT, counts

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Rows of partials read at once, over their width: with more, fewer or 4 warps it spills on one generation or other.
FOLD_ROWS_PER_COLUMN = 4
FOLD_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
SUMS = sum("merge" not in f.metadata for f in fields(PolicyStats))
COLUMNS = len(fields(PolicyStats))


@triton.jit
def scalar(x, POINTER: tl.constexpr):
    """A number that came by value, or as a pointer to a 0-dim tensor, in fp32."""
    if POINTER:
        return tl.load(x).to(tl.float32)
    else:
        return x


@triton.jit
def stream(pointer, index, keep):
    """A stream at the entries that count, 0 elsewhere; what is masked is not read, so it may be NaN or not exist."""
    return tl.load(pointer + index, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def bounded_exp(x, LIMIT: tl.constexpr):
    """exp(x), continued along its tangent beyond LIMIT."""
    bounded = tl.minimum(x, LIMIT)
    return tl.exp(bounded) + (x - bounded) * tl.exp(tl.full((), LIMIT, tl.float32))


@triton.jit
def exp_minus_tangent(x, LIMIT: tl.constexpr):
    """exp(x) - 1 - x: the value of k3 at d = -x, without cancellation near 0."""
    # The series to x^9 is exact to fp32 for |x| < 0.5.
    series = 1.0 / 40320.0 + x * (1.0 / 362880.0)
    series = 1.0 / 720.0 + x * (1.0 / 5040.0 + x * series)
    series = 0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * series)))
    return tl.where(tl.abs(x) < 0.5, x * x * series, bounded_exp(x, LIMIT) - 1.0 - x)


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
def column_of(totals, value, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    """`totals` with `value` in one column."""
    return tl.where(tl.arange(0, WIDTH) == COLUMN, value, totals)


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


@triton.jit
def fold_statistics_kernel(
    partials_ptr,
    stats_ptr,
    loss_ptr,
    programs,
    normalizer,
    NORMALIZER_POINTER: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns before SUMS add up, SUMS is a minimum, those behind it are maxima; the loss is column 2 / normalizer."""
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    low = tl.full((WIDTH,), float("inf"), tl.float64)
    high = tl.full((WIDTH,), float("-inf"), tl.float64)
    for first in range(0, programs, BLOCK):
        row = (first + tl.arange(0, BLOCK))[:, None]
        inside = (row < programs) & (column[None, :] >= 0)
        part = tl.load(partials_ptr + row * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(part, axis=0)
        low = tl.minimum(low, tl.min(tl.where(inside, part, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, part, float("-inf")), axis=0))
    stats = tl.where(column < SUMS, total, tl.where(column == SUMS, low, high))
    tl.store(stats_ptr + column, stats)
    loss = tl.sum(tl.where(column == 2, total, 0.0)) / scalar(normalizer, NORMALIZER_POINTER)
    tl.store(loss_ptr, loss.to(tl.float32))


def fold(partials: Tensor, normalizer, sums: int) -> tuple[Tensor, Tensor]:
    """(statistics [WIDTH] fp64, loss 0-dim fp32) of the programs' rows, in one more launch."""
    stats = torch.empty(partials.shape[1], dtype=torch.float64, device=partials.device)
    loss = torch.empty((), dtype=torch.float32, device=partials.device)
    with torch.cuda.device_of(partials):
        note_launch("fold_statistics", "triton")
        fold_statistics_kernel[(1,)](
            partials,
            stats,
            loss,
            partials.shape[0],
            on_device(normalizer),
            NORMALIZER_POINTER=isinstance(normalizer, Tensor),
            SUMS=sums,
            WIDTH=partials.shape[1],
            BLOCK=FOLD_ROWS_PER_COLUMN * partials.shape[1],
            **FOLD_OPTIONS,
        )
    return stats, loss


def on_device(number):
    """A kernel's number: a float by value, a 0-dim tensor as it is."""
    return number if isinstance(number, Tensor) else float(number)


def bytes_of(mask_A: Tensor) -> Tensor:
    """A mask as kernels read it: one byte a token, 0 where masked."""
    return (mask_A if mask_A.dtype == torch.bool else mask_A != 0).contiguous().view(torch.uint8)


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
            note_launch("ppo_policy_loss", "triton")
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


class AttachTokenGradients(torch.autograd.Function):
    """Gives a loss the per-token gradients that were formed with it; backward scales them by the upstream scalar."""

    @staticmethod
    def forward(ctx, op, loss, *pairs):
        ctx.op, ctx.dtypes = op, [x.dtype for x in pairs[::2]]
        ctx.save_for_backward(*pairs[1::2])
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        single_backward(ctx.op)
        found = []
        for grad_A, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            found += [(grad_A * upstream).to(dtype), None]
        return None, None, *found


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
