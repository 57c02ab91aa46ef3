"""The clipped value loss in Triton: loss, statistics and gradient of every token in one launch, nothing atomic.

Programs leave rows of statistics, which `fold` adds in order: see ppo_policy_loss_triton.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import AttachTokenGradients, bytes_of, column_of, fold, on_device, scalar, stream
from ..dispatch import log_launch
from ..types import ValueLoss, ValueStats

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUMS = sum("merge" not in f.metadata for f in fields(ValueStats))
COLUMNS = len(fields(ValueStats))


@triton.jit
def value_loss_kernel(
    value_ptr,
    old_ptr,
    return_ptr,
    mask_ptr,
    weight_ptr,
    grad_ptr,
    partials_ptr,
    size,
    old_size,
    mask_size,
    weight_size,
    clip,
    normalizer,
    NORMALIZER_POINTER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    keep = inside & (tl.load(mask_ptr + index, mask=index < mask_size, other=1) != 0)
    value, target = stream(value_ptr, index, keep), stream(return_ptr, index, keep)
    weight = stream(weight_ptr, index, keep & (index < weight_size))
    weight = tl.where(index < weight_size, weight, tl.where(keep, 1.0, 0.0))
    old = tl.where(index < old_size, stream(old_ptr, index, keep & (index < old_size)), value)
    error = target - value
    step = tl.minimum(tl.maximum(value - old, -clip), clip)
    cautious = old + step - target
    plain, bounded = error * error, cautious * cautious
    clipped = (bounded > plain) & (index < old_size)
    worst = tl.where(clipped, bounded, plain)
    # Where the clipped error is the larger one the clip is active and the value has no pull, unless the clip is not
    # (rounding of old + step alone can make it larger): then it pulls like the plain one.
    moves = tl.abs(value - old) <= clip
    slope = tl.where(clipped, tl.where(moves, cautious, 0.0), -error)
    grad = slope * weight / scalar(normalizer, NORMALIZER_POINTER)
    tl.store(grad_ptr + index, tl.where(keep, grad, 0.0), mask=inside)

    row = tl.zeros((WIDTH,), tl.float32)
    row = column_of(row, tl.sum(tl.where(keep, 1.0, 0.0)), 0, WIDTH)
    row = column_of(row, tl.sum(weight), 1, WIDTH)
    row = column_of(row, tl.sum(0.5 * worst * weight), 2, WIDTH)
    row = column_of(row, tl.sum(tl.where(clipped & keep, 1.0, 0.0)), 3, WIDTH)
    row = column_of(row, tl.sum(value), 4, WIDTH)
    row = column_of(row, tl.sum(value * value), 5, WIDTH)
    row = column_of(row, tl.sum(target), 6, WIDTH)
    row = column_of(row, tl.sum(target * target), 7, WIDTH)
    row = column_of(row, tl.sum(error), 8, WIDTH)
    row = column_of(row, tl.sum(error * error), 9, WIDTH)
    row = column_of(row, tl.min(tl.where(keep, value, float("inf"))), 10, WIDTH)
    row = column_of(row, tl.max(tl.where(keep, value, float("-inf"))), 11, WIDTH)
    tl.store(partials_ptr + block * WIDTH + tl.arange(0, WIDTH), row)


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
    size, device = value_A.shape[0], value_A.device
    grad_A = torch.empty(size, dtype=torch.float32, device=device)
    width = triton.next_power_of_2(COLUMNS)
    partials = torch.empty(triton.cdiv(size, BLOCK), width, dtype=torch.float32, device=device)
    plain_A = value_A.detach().contiguous()
    old_A = None if clip is None else old_value_A
    old, mask, weight = (plain_A if x is None else x.detach().contiguous() for x in (old_A, mask_A, weight_A))
    if size:
        with torch.cuda.device_of(value_A):
            log_launch("value_loss", "triton")
            value_loss_kernel[(partials.shape[0],)](
                plain_A,
                old,
                return_A.detach().contiguous(),
                mask if mask_A is None else bytes_of(mask),
                weight,
                grad_A,
                partials,
                size,
                *(0 if x is None else size for x in (old_A, mask_A, weight_A)),
                math.inf if clip is None else float(clip),
                on_device(normalizer),
                NORMALIZER_POINTER=isinstance(normalizer, Tensor),
                WIDTH=width,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    stats, loss = fold(partials, normalizer, SUMS)
    values = stats[:COLUMNS].unbind()
    result = ValueStats(**{f.name: x for f, x in zip(fields(ValueStats), values, strict=True)})
    return ValueLoss(AttachTokenGradients.apply("value_loss", loss, value_A, grad_A), result)
