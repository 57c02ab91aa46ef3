"""The clipped value loss in Triton: loss, statistics and gradient of every token in one launch, without atomics.

Programs write rows of statistics, which `common.triton.fold` adds in order, as for the policy loss. The moments of
returns and errors, for the explained variance, are two launches of masked_moments.
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
    fold_statistics,
    load_scalar,
    load_stream,
    set_column,
    value_and_pointer,
)
from ..dispatch import log_launch
from ..stats import ValueStats
from ..types import ValueLoss
from ..whitening.triton import masked_moments
from .inputs import ValueStreams

# Legend
#   A         actions of the packed stream; every stream is [A]
#   *_size    extent of an optional stream: A, or 0 if it is absent
#   BLOCK     tokens of one program
#   partials  [programs, WIDTH] fp32, one row of statistics per program, columns in the order of NAMES

BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUMS = sum("merge" not in f.metadata for f in fields(ValueStats))
NAMES = tuple(f.name for f in fields(ValueStats) if f.metadata.get("merge") != "m2")
COLUMNS = len(NAMES)
# Operations per token, for the declared cost: both errors, the gradient and the statistics.
FLOPS = 40


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
    """Write the gradient by value and one row of statistics for BLOCK tokens."""
    # 1. Load the streams. An absent one has size 0, so its mask is empty and its pointer is never read.
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    keep = inside & (tl.load(mask_ptr + index, mask=index < mask_size, other=1) != 0)
    value, target = load_stream(value_ptr, index, keep), load_stream(return_ptr, index, keep)
    weight = load_stream(weight_ptr, index, keep & (index < weight_size))
    weight = tl.where(index < weight_size, weight, tl.where(keep, 1.0, 0.0))
    # Without an old value the step is 0 and the clip never active.
    old = tl.where(index < old_size, load_stream(old_ptr, index, keep & (index < old_size)), value)

    # 2. The larger of the plain and the clipped squared error.
    error = target - value
    step = tl.minimum(tl.maximum(value - old, -clip), clip)
    clipped_error = old + step - target
    plain, bounded = error * error, clipped_error * clipped_error
    # An old value of NaN compares as false, and must make loss and gradient NaN.
    clipped = ((bounded > plain) | (old != old)) & (index < old_size)
    worst = tl.where(clipped, bounded, plain)

    # 3. The gradient. If the clipped error is larger, the clip is active and the slope is 0. Rounding of old + step can
    #    make it larger within the clip too: the slope is then that of the unclipped error.
    beyond_clip = tl.abs(value - old) > clip
    slope = tl.where(clipped, tl.where(beyond_clip, 0.0, clipped_error), -error)
    grad = slope * weight / load_scalar(normalizer, NORMALIZER_POINTER)
    tl.store(grad_ptr + index, tl.where(keep, grad, 0.0), mask=inside)

    # 4. Statistics, one column for each of NAMES: 10 sums, a minimum and a maximum.
    row = tl.zeros((WIDTH,), tl.float32)
    row = set_column(row, tl.sum(tl.where(keep, 1.0, 0.0)), 0, WIDTH)
    row = set_column(row, tl.sum(weight), 1, WIDTH)
    row = set_column(row, tl.sum(0.5 * worst * weight), 2, WIDTH)
    row = set_column(row, tl.sum(tl.where(clipped & keep, 1.0, 0.0)), 3, WIDTH)
    row = set_column(row, tl.sum(value), 4, WIDTH)
    row = set_column(row, tl.sum(value * value), 5, WIDTH)
    row = set_column(row, tl.sum(target), 6, WIDTH)
    row = set_column(row, tl.sum(target * target), 7, WIDTH)
    row = set_column(row, tl.sum(error), 8, WIDTH)
    row = set_column(row, tl.sum(error * error), 9, WIDTH)
    row = set_column(row, tl.min(tl.where(keep, value, float("inf"))), 10, WIDTH)
    row = set_column(row, tl.max(tl.where(keep, value, float("-inf"))), 11, WIDTH)
    tl.store(partials_ptr + block * WIDTH + tl.arange(0, WIDTH), row)


def value_loss(value_A: Tensor, streams: ValueStreams, clip: float | None, normalizer: float | Tensor) -> ValueLoss:
    """Return the loss and its statistics; see the public function."""
    # 1. Allocate one gradient per token and one row of statistics per program.
    size, device = value_A.shape[0], value_A.device
    grad_A = torch.empty(size, dtype=torch.float32, device=device)
    width = triton.next_power_of_2(COLUMNS)
    partials = torch.empty(triton.cdiv(size, BLOCK), width, dtype=torch.float32, device=device)
    # 2. Launch; an empty stream has no program, and `fold_statistics` returns zeros for it.
    constant_A, weight_A = value_A.detach().contiguous(), streams.weight_A
    if size:
        old_A = None if clip is None else streams.old_value_A
        _value_step(
            constant_A,
            None if old_A is None else old_A.detach().contiguous(),
            streams.return_A.detach().contiguous(),
            None if streams.mask_A is None else mask_bytes(streams.mask_A),
            None if weight_A is None else weight_A.detach().contiguous(),
            grad_A,
            partials,
            math.inf if clip is None else float(clip),
            *value_and_pointer(normalizer),
        )
    stats, loss = fold_statistics(partials, normalizer, SUMS)
    # 3. Moments in fp64. Their mean also replaces the sums, which programs add in fp32.
    return_A = streams.return_A.float()
    returns = masked_moments(return_A, streams.mask_A, None)
    errors = masked_moments(return_A - constant_A.float(), streams.mask_A, None)
    values = dict(zip(NAMES, stats[:COLUMNS].unbind(), strict=True))
    for name, moments in (("return", returns), ("error", errors)):
        values |= {f"{name}_sum": moments.mean * moments.count, f"{name}_m2": moments.m2}
    return ValueLoss(AttachTokenGradients.apply("value_loss", loss, value_A, grad_A), ValueStats(**values))


def _value_cost(
    value_A: Tensor,
    old_A: Tensor | None,
    return_A: Tensor,
    mask_A: Tensor | None,
    weight_A: Tensor | None,
    grad_A: Tensor,
    partials: Tensor,
    clip: float,
    normalizer: float,
    normalizer_ptr: Tensor | None,
) -> Cost:
    reads = [value_A, old_A, return_A, mask_A, weight_A, normalizer_ptr]
    return Cost.of_pass(reads, [grad_A, partials], FLOPS * value_A.numel())


@device_operator(
    "value_loss(Tensor value, Tensor? old, Tensor returns, Tensor? mask, Tensor? weight, Tensor(a!) grad, "
    "Tensor(b!) partials, float clip, float normalizer, Tensor? normalizer_ptr)",
    _value_cost,
)
def _value_step(
    value_A: Tensor,
    old_A: Tensor | None,
    return_A: Tensor,
    mask_A: Tensor | None,
    weight_A: Tensor | None,
    grad_A: Tensor,
    partials: Tensor,
    clip: float,
    normalizer: float,
    normalizer_ptr: Tensor | None,
) -> None:
    # An absent stream is replaced by the values and gets size 0, so that one binary serves all combinations.
    size, optional = value_A.shape[0], (old_A, mask_A, weight_A)
    old, mask, weight = (value_A if x is None else x for x in optional)
    with torch.cuda.device_of(value_A):
        log_launch("value_loss", "triton")
        value_loss_kernel[(partials.shape[0],)](
            value_A,
            old,
            return_A,
            mask,
            weight,
            grad_A,
            partials,
            size,
            *(0 if x is None else size for x in optional),
            clip,
            normalizer if normalizer_ptr is None else normalizer_ptr,
            NORMALIZER_POINTER=normalizer_ptr is not None,
            WIDTH=partials.shape[1],
            BLOCK=BLOCK,
            **OPTIONS,
        )
