"""The norms in Triton: one launch forward, one backward, and a sum of the weight's gradient, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.precision import saturating_cast
from ..dispatch import log_launch
from .function import Forward, Steps, row_strides, run

# Legend
#   H         elements of a row; BLOCK of them are loaded, the next power of two
#   S         rows; ROWS of them are one tile
#   partials  [programs, H] fp32, the weight's gradient over the tiles of a program
# Row i of x starts at (i // inner) * outer_stride + (i % inner) * inner_stride; all other tensors are contiguous.

TILE = 2048  # elements of a tile of short rows; a longer row is a tile of its own
PROGRAMS = 512  # of the backward, at most; a constant, so that the sums have the same bits on every device
# Operations per element, for the declared cost.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 9


def tile(width: int) -> tuple[int, int, dict[str, int | bool]]:
    """Return ROWS, BLOCK and the launch options for rows of `width` elements."""
    block = triton.next_power_of_2(max(1, width))
    rows = max(1, TILE // block)
    return rows, block, {"num_warps": 4 if block <= TILE else min(16, block // 512), "enable_fp_fusion": True}


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    scale_ptr,
    rows,
    width,
    inner,
    outer_stride,
    inner_stride,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the norm of ROWS rows, or of their sums with a residual, and 1 / rms of each."""
    # 1. Load the rows. With ADD, what is normalised is the rounded sum.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    source = (row // inner) * outer_stride + (row % inner) * inner_stride
    index = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + index, mask=inside, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + index, total, mask=inside)
        x = total.to(tl.float32)
    # 2. Normalise.
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, x * scale[:, None] * weight[None, :], mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    partials_ptr,
    rows,
    width,
    inner,
    outer_stride,
    inner_stride,
    tiles,
    ADD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient by every tile's rows of this program, and their part of the weight's gradient.

    With n = x * scale and g = grad * weight:

        grad_x = scale * (g - n * mean(g * n)) + grad_sum,   grad_weight = sum of grad * n
    """
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), tl.float32)
    # Tiles are far apart, so that programs of one wave read neighbouring memory.
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(number, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        source = (row // inner) * outer_stride + (row % inner) * inner_stride
        index = row[:, None] * width + column[None, :]
        x = tl.load(x_ptr + source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = x * scale
        scaled = grad * weight[None, :]
        mean = tl.sum(scaled * normed, axis=1) / width
        grad_x = scale * (scaled - normed * mean[:, None])
        if ADD:
            grad_x += tl.load(grad_sum_ptr + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + index, grad_x, mask=inside)
        if WEIGHTED:
            part += tl.sum(grad * normed, axis=0)
    if WEIGHTED:
        offset = tl.program_id(0).to(tl.int64) * width
        tl.store(partials_ptr + offset + column, part, mask=column < width)


def _forward_cost(
    x: Tensor,
    residual: Tensor | None,
    weight_H: Tensor,
    out: Tensor,
    total: Tensor | None,
    scale_S: Tensor,
    layout: list[int],
    eps: float,
) -> Cost:
    return Cost.of_pass([x, residual, weight_H], [out, total, scale_S], FORWARD_FLOPS * x.numel())


@device_operator(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor(a!) out, Tensor(b!)? total, Tensor(c!) scale, "
    "int[] layout, float eps)",
    _forward_cost,
)
def _forward_step(
    x: Tensor,
    residual: Tensor | None,
    weight_H: Tensor,
    out: Tensor,
    total: Tensor | None,
    scale_S: Tensor,
    layout: list[int],
    eps: float,
) -> None:
    size, width = scale_S.shape[0], weight_H.shape[0]
    rows, block, options = tile(width)
    with torch.cuda.device_of(x):
        log_launch("rms_norm_forward", "triton")
        rms_norm_forward_kernel[(triton.cdiv(size, rows),)](
            x,
            x if residual is None else residual,
            weight_H,
            out,
            out if total is None else total,
            scale_S,
            size,
            width,
            *layout,
            eps,
            ADD=residual is not None,
            ROWS=rows,
            BLOCK=block,
            **options,
        )


def _backward_cost(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight_H: Tensor,
    scale_S: Tensor,
    grad_x: Tensor,
    partials: Tensor | None,
    layout: list[int],
) -> Cost:
    reads = [grad, grad_total, total, weight_H, scale_S]
    return Cost.of_pass(reads, [grad_x, partials], BACKWARD_FLOPS * grad.numel())


@device_operator(
    "rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight, Tensor scale, Tensor(a!) grad_x, "
    "Tensor(b!)? partials, int[] layout)",
    _backward_cost,
)
def _backward_step(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight_H: Tensor,
    scale_S: Tensor,
    grad_x: Tensor,
    partials: Tensor | None,
    layout: list[int],
) -> None:
    size, width = scale_S.shape[0], weight_H.shape[0]
    rows, block, options = tile(width)
    tiles = triton.cdiv(size, rows)
    with torch.cuda.device_of(grad):
        log_launch("rms_norm_backward", "triton")
        rms_norm_backward_kernel[(min(tiles, PROGRAMS),)](
            grad,
            grad if grad_total is None else grad_total,
            total,
            weight_H,
            scale_S,
            grad_x,
            scale_S if partials is None else partials,
            size,
            width,
            *layout,
            tiles,
            ADD=grad_total is not None,
            WEIGHTED=partials is not None,
            ROWS=rows,
            BLOCK=block,
            **options,
        )


def _forward(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float) -> Forward:
    if residual is not None:
        x, residual = x.contiguous(), residual.contiguous()
    layout, x = _layout(x)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(normed)
    size = x.numel() // x.shape[-1] if x.numel() else 0
    scale_S = torch.empty(size, dtype=torch.float32, device=x.device)
    if size:
        _forward_step(x, residual, weight_H.contiguous(), normed, total, scale_S, layout, eps)
    return Forward(normed, x if total is None else total, scale_S)


def _backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight_H: Tensor, scale_S: Tensor, weighted: bool
) -> tuple[Tensor, Tensor | None]:
    layout, total = _layout(total)
    # fp16 is rounded afterwards: the kernel would write infinity beyond its range.
    dtype = torch.float32 if total.dtype == torch.float16 else total.dtype
    grad_x = torch.empty(total.shape, dtype=dtype, device=total.device)
    width, size = weight_H.shape[0], scale_S.shape[0]
    partials = None
    if weighted:
        programs = min(triton.cdiv(size, tile(width)[0]), PROGRAMS)
        partials = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    if size:
        grad_total = None if grad_total is None else grad_total.contiguous()
        _backward_step(grad.contiguous(), grad_total, total, weight_H.contiguous(), scale_S, grad_x, partials, layout)
    grad_weight_H = None if partials is None else saturating_cast(partials.sum(0), weight_H.dtype)
    return saturating_cast(grad_x, total.dtype), grad_weight_H


def _layout(x: Tensor) -> tuple[list[int], Tensor]:
    """Return how the rows of x lie, and x itself or a contiguous copy."""
    strides = row_strides(x)
    if strides is None:
        x = x.contiguous()
        strides = row_strides(x)
    assert strides is not None
    return list(strides), x


_STEPS = Steps(_forward, _backward)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return the norm of the rows of x; see the public function."""
    return run(_STEPS, x, None, weight_H, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """Return the norm of x + residual, and the sum; see the public function."""
    return run(_STEPS, x, residual, weight_H, eps)
