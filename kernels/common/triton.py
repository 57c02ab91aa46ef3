"""Parts of Triton kernels over streams of tokens that several operations use."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import log_launch
from ..validate import single_backward

# Rows of partials read at once, over their width: with more, fewer or 4 warps it spills on one generation or other.
FOLD_ROWS_PER_COLUMN = 4


FOLD_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


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
def column_of(totals, value, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    """`totals` with `value` in one column."""
    return tl.where(tl.arange(0, WIDTH) == COLUMN, value, totals)


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
        log_launch("fold_statistics", "triton")
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
