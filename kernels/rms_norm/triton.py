"""The norms in Triton: one launch forward, one backward, and a sum of the weight's gradient, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.precision import saturating_cast
from ..dispatch import log_launch
from .function import Buffers, Forward, Steps, output_strides, row_strides, run

# Legend
#   H, width  elements of a row, read in CHUNKS chunks of BLOCK
#   S, rows   rows; ROWS of them are one tile
#   partials  [programs, H] fp32, the weight's gradient over the tiles of a program
# Row i of x starts at (i // inner) * outer_stride + (i % inner) * inner_stride, and of a STRIDED out likewise. All
# other tensors are contiguous.

TILE = 2048  # elements of a tile of short rows
# Rows beyond LONGEST_BLOCK are read twice, in chunks of TILE.
# Triton 3.6 to 3.9 spill registers on sm_80, sm_90 or sm_100 with longer blocks, longer chunks or fewer warps.
LONGEST_BLOCK = 4096
PROGRAMS = 512  # of the backward, at most; a constant, so that the sums have the same bits on every device
# Operations per element, for the declared cost.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 9


def tile(width: int) -> tuple[dict[str, int], dict[str, int | bool]]:
    """Return the constants ROWS, BLOCK and CHUNKS, and the launch options, for rows of `width` elements."""
    block = triton.next_power_of_2(max(1, width))
    if block > LONGEST_BLOCK:
        block = min(TILE, LONGEST_BLOCK)
    constants = {"ROWS": max(1, TILE // block), "BLOCK": block, "CHUNKS": max(1, triton.cdiv(width, block))}
    return constants, {"num_warps": 4 if width <= TILE else 8 if block <= TILE else 16, "enable_fp_fusion": True}


@triton.jit
def load_rows(pointer, start, column, inside):
    """Return elements of a tile in fp32, 0 outside; `start` are offsets of the rows."""
    return tl.load(pointer + start + column[None, :], mask=inside, other=0.0).to(tl.float32)


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
    out_inner,
    out_outer_stride,
    out_inner_stride,
    eps,
    ADD: tl.constexpr,
    SAVE: tl.constexpr,
    STRIDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Write the norm of ROWS rows, or of their sums with a residual, and 1 / rms of each if SAVE."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row[:, None] * width
    source = ((row // inner) * outer_stride + (row % inner) * inner_stride)[:, None]
    target = start
    if STRIDED:
        target = ((row // out_inner) * out_outer_stride + (row % out_inner) * out_inner_stride)[:, None]
    # 1. The mean of squares. With ADD, what is normalised is the rounded sum.
    squares = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for chunk in range(CHUNKS):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        total = load_rows(x_ptr, source, column, inside)
        if ADD:
            total += load_rows(residual_ptr, start, column, inside)
            rounded = total.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + start + column[None, :], rounded, mask=inside)
            total = rounded.to(tl.float32)
        squares += tl.sum(total * total, axis=1)
    scale = 1.0 / tl.sqrt(squares / width + eps)
    if SAVE:
        tl.store(scale_ptr + row, scale, mask=row < rows)
    # 2. Normalise. A single chunk is still at hand; a program reads back what its own threads wrote.
    for chunk in range(CHUNKS):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        if CHUNKS > 1:
            if ADD:
                total = load_rows(sum_ptr, start, column, inside)
            else:
                total = load_rows(x_ptr, source, column, inside)
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(out_ptr + target + column[None, :], total * scale[:, None] * weight[None, :], mask=inside)


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
    CHUNKS: tl.constexpr,
):
    """Write the gradient by every tile's rows of this program, and their part of the weight's gradient.

    With n = x * scale and g = grad * weight:

        grad_x = scale * (g - n * mean(g * n)) + grad_sum,   grad_weight = sum of grad * n
    """
    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * width
    part = tl.zeros((BLOCK,), tl.float32)
    # Tiles of a program are far apart, so that programs of one wave read neighbouring memory.
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(number, tl.int64) * ROWS + tl.arange(0, ROWS)
        start = row[:, None] * width
        source = ((row // inner) * outer_stride + (row % inner) * inner_stride)[:, None]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        # 1. mean(g * n), over all chunks of a row
        products = tl.zeros((ROWS,), tl.float32)
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        normed = tl.zeros((ROWS, BLOCK), tl.float32)
        for chunk in range(CHUNKS):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            inside = (row < rows)[:, None] & (column < width)[None, :]
            weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
            grad = load_rows(grad_ptr, start, column, inside)
            normed = load_rows(x_ptr, source, column, inside) * scale
            products += tl.sum(grad * weight[None, :] * normed, axis=1)
        mean = (products / width)[:, None]
        # 2. The gradients. A single chunk is still at hand.
        for chunk in range(CHUNKS):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            inside = (row < rows)[:, None] & (column < width)[None, :]
            weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
            if CHUNKS > 1:
                grad = load_rows(grad_ptr, start, column, inside)
                normed = load_rows(x_ptr, source, column, inside) * scale
            grad_x = scale * (grad * weight[None, :] - normed * mean)
            if ADD:
                grad_x += load_rows(grad_sum_ptr, start, column, inside)
            tl.store(grad_x_ptr + start + column[None, :], grad_x, mask=inside)
            if WEIGHTED:
                addend = tl.sum(grad * normed, axis=0)
                if CHUNKS > 1:
                    # The part of a long row is in memory. Its first tile writes, later ones add.
                    if number >= tl.num_programs(0):
                        addend += tl.load(partial_ptr + column, mask=column < width, other=0.0)
                    tl.store(partial_ptr + column, addend, mask=column < width)
                else:
                    part += addend
    if WEIGHTED and CHUNKS == 1:
        column = tl.arange(0, BLOCK)
        tl.store(partial_ptr + column, part, mask=column < width)


def _forward_cost(
    x: Tensor,
    residual: Tensor | None,
    weight_H: Tensor,
    out: Tensor,
    total: Tensor | None,
    scale_S: Tensor | None,
    layout: list[int],
    eps: float,
) -> Cost:
    return Cost.of_pass([x, residual, weight_H], [out, total, scale_S], FORWARD_FLOPS * x.numel())


@device_operator(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor(a!) out, Tensor(b!)? total, Tensor(c!)? scale, "
    "int[] layout, float eps)",
    _forward_cost,
)
def _forward_step(
    x: Tensor,
    residual: Tensor | None,
    weight_H: Tensor,
    out: Tensor,
    total: Tensor | None,
    scale_S: Tensor | None,
    layout: list[int],
    eps: float,
) -> None:
    width = weight_H.shape[0]
    size = x.numel() // width
    constants, options = tile(width)
    with torch.cuda.device_of(x):
        log_launch("rms_norm_forward", "triton")
        rms_norm_forward_kernel[(triton.cdiv(size, constants["ROWS"]),)](
            x,
            x if residual is None else residual,
            weight_H,
            out,
            out if total is None else total,
            out if scale_S is None else scale_S,
            size,
            width,
            *layout,
            eps,
            ADD=residual is not None,
            SAVE=scale_S is not None,
            STRIDED=not out.is_contiguous(),
            **constants,
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
    constants, options = tile(width)
    tiles = triton.cdiv(size, constants["ROWS"])
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
            **constants,
            **options,
        )


def _forward(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float, buffers: Buffers) -> Forward:
    if residual is not None:
        x, residual = x.contiguous(), residual.contiguous()
    layout, x = _layout(x)
    normed, total = buffers.out, buffers.sum_out
    if normed is None:
        normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if residual is not None and total is None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.numel() // x.shape[-1] if x.numel() else 0
    scale_S = torch.empty(size, dtype=torch.float32, device=x.device) if buffers.saves_scale else None
    if size:
        layout += output_strides(normed)
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
        programs = min(triton.cdiv(size, tile(width)[0]["ROWS"]), PROGRAMS)
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


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, out: Tensor | None) -> Tensor:
    """Return the norm of the rows of x; see the public function."""
    return run(_STEPS, x, None, weight_H, eps, out)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor, eps: float, out: Tensor | None, sum_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the norm of x + residual, and the sum; see the public function."""
    return run(_STEPS, x, residual, weight_H, eps, out, sum_out)
