"""Parts of Triton kernels over streams of tokens that several operations use."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import log_launch
from ..validate import single_backward
from .operators import Cost, device_operator
from .precision import saturating_cast

# Legend
#   A         actions of the packed stream
#   programs  Triton programs of the first launch; each owns one row of partial statistics
#   WIDTH     statistics per row, padded to a power of two
#   partials  [programs, WIDTH] fp32
#   stats     [WIDTH] fp64: sums first, then one minimum, then maxima

# A fold step reads FOLD_ROWS_PER_COLUMN * WIDTH rows of partials.
# Triton 3.6 to 3.9 spill registers on sm_80, sm_90 or sm_100 with more rows, fewer rows or 4 warps.
FOLD_ROWS_PER_COLUMN = 4
FOLD_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def load_scalar(x, POINTER: tl.constexpr):
    """Return a number in fp32 that was passed by value, or by pointer to a 0-dim tensor."""
    if POINTER:
        return tl.load(x).to(tl.float32)
    else:
        return x


@triton.jit
def load_stream(pointer, index, keep):
    """Return a stream in fp32, 0 where not kept. Masked entries are not read: they may hold NaN or not exist."""
    return tl.load(pointer + index, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def bounded_exp(x, LIMIT: tl.constexpr):
    """Return exp(x), continued along its tangent beyond LIMIT."""
    # Not minimum: it would turn NaN into LIMIT.
    bounded = tl.where(x > LIMIT, LIMIT, x)
    return tl.exp(bounded) + (x - bounded) * tl.exp(tl.full((), LIMIT, tl.float32))


@triton.jit
def floor_logprob(logprob, FLOOR: tl.constexpr):
    """Return a log-prob with FLOOR for -inf."""
    return tl.where(logprob == -float("inf"), FLOOR, logprob)


@triton.jit
def exp_minus_tangent(x, LIMIT: tl.constexpr):
    """Return exp(x) - 1 - x: the value of k3 at d = -x, without cancellation near 0."""
    # exp(x) - 1 - x cancels near 0. The series to x^9 is exact to fp32 for |x| < 0.5.
    series = 1.0 / 40320.0 + x * (1.0 / 362880.0)
    series = 1.0 / 720.0 + x * (1.0 / 5040.0 + x * series)
    series = 0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * series)))
    return tl.where(tl.abs(x) < 0.5, x * x * series, bounded_exp(x, LIMIT) - 1.0 - x)


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr, LIMIT: tl.constexpr):
    """Return the estimator of the difference d = logprob - ref_logprob."""
    if ESTIMATOR == "k1":
        return d
    elif ESTIMATOR == "k2":
        return 0.5 * d * d
    elif ESTIMATOR == "abs":
        return tl.abs(d)
    else:
        return exp_minus_tangent(-d, LIMIT)


@triton.jit
def set_column(row, value, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    """Return `row` [WIDTH] with `value` in one column."""
    return tl.where(tl.arange(0, WIDTH) == COLUMN, value, row)


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
    """Fold rows of partials. Columns before SUMS add up, SUMS is a minimum, later ones are maxima.

    loss = column 2 / normalizer
    """
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    low = tl.full((WIDTH,), float("inf"), tl.float64)
    high = tl.full((WIDTH,), float("-inf"), tl.float64)
    # 1. One program walks the rows in order, so the sums have the same bits on every run.
    for first in range(0, programs, BLOCK):
        row = (first + tl.arange(0, BLOCK))[:, None]
        inside = (row < programs) & (column[None, :] >= 0)
        part = tl.load(partials_ptr + row * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(part, axis=0)
        low = tl.minimum(low, tl.min(tl.where(inside, part, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, part, float("-inf")), axis=0))
    # 2. Every column was reduced in all three ways; keep the one that it needs.
    stats = tl.where(column < SUMS, total, tl.where(column == SUMS, low, high))
    tl.store(stats_ptr + column, stats)
    # 3. Divide the loss in fp64 and round once.
    loss = tl.sum(tl.where(column == 2, total, 0.0)) / load_scalar(normalizer, NORMALIZER_POINTER)
    tl.store(loss_ptr, loss.to(tl.float32))


def fold_statistics(partials: Tensor, normalizer: float | Tensor, sums: int) -> tuple[Tensor, Tensor]:
    """Return (statistics [WIDTH] fp64, loss 0-dim fp32) of the programs' rows, in one more launch."""
    stats = torch.empty(partials.shape[1], dtype=torch.float64, device=partials.device)
    loss = torch.empty((), dtype=torch.float32, device=partials.device)
    _fold_step(partials, stats, loss, *value_and_pointer(normalizer), sums)
    return stats, loss


def _fold_cost(
    partials: Tensor, stats: Tensor, loss: Tensor, normalizer: float, normalizer_ptr: Tensor | None, sums: int
) -> Cost:
    # A sum, a minimum and a maximum of every entry.
    return Cost.of_pass([partials, normalizer_ptr], [stats, loss], 3 * partials.numel())


@device_operator(
    "fold_statistics(Tensor partials, Tensor(a!) stats, Tensor(b!) loss, float normalizer, Tensor? normalizer_ptr, "
    "int sums)",
    _fold_cost,
)
def _fold_step(
    partials: Tensor, stats: Tensor, loss: Tensor, normalizer: float, normalizer_ptr: Tensor | None, sums: int
) -> None:
    with torch.cuda.device_of(partials):
        log_launch("fold_statistics", "triton")
        fold_statistics_kernel[(1,)](
            partials,
            stats,
            loss,
            partials.shape[0],
            normalizer if normalizer_ptr is None else normalizer_ptr,
            NORMALIZER_POINTER=normalizer_ptr is not None,
            SUMS=sums,
            WIDTH=partials.shape[1],
            BLOCK=FOLD_ROWS_PER_COLUMN * partials.shape[1],
            **FOLD_OPTIONS,
        )


def value_and_pointer(number: float | Tensor) -> tuple[float, Tensor | None]:
    """Return a number as an operator takes it: a float by value, or a 0-dim tensor as a pointer."""
    return (0.0, number) if isinstance(number, Tensor) else (float(number), None)


class AttachTokenGradients(torch.autograd.Function):
    """Attach per-token gradients, formed with a loss, to that loss; backward scales them by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, op: str, loss: Tensor, *pairs: Tensor) -> Tensor:
        # pairs: input, its gradient, next input, its gradient, ...
        ctx.op, ctx.dtypes = op, [x.dtype for x in pairs[::2]]
        ctx.save_for_backward(*pairs[1::2])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward(ctx.op)
        (grad_loss,) = upstream
        grads: list[Tensor | None] = []
        for grad_A, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            grads += [saturating_cast(grad_A * grad_loss, dtype), None]
        return None, None, *grads
