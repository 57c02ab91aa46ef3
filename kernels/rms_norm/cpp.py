"""The norms on CPU threads (csrc/rms_norm.hpp): one pass forward, one backward, fp32 inside for bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, dtype_name, hold
from ..common.precision import saturating_cast
from ..dispatch import log_launch
from ..validate import wide_dtype
from .function import Buffers, Forward, Steps, output_strides, row_strides, run

# Legend: H, elements of a row; S, rows.


def _forward(x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float, buffers: Buffers) -> Forward:
    # 1. fp16, or a weight of another dtype: rows are widened. The sum is rounded as if it were formed alone.
    dtype = dtype_name(x, weight_H)
    if dtype is None:
        total = x if residual is None else torch.add(x, residual, out=buffers.sum_out)
        wide = wide_dtype(x, weight_H)
        unrounded = Buffers(saves_scale=buffers.saves_scale)
        normed, _, scale_S = _forward(total.to(wide), None, weight_H.to(wide), eps, unrounded)
        return Forward(normed.to(x.dtype) if buffers.out is None else buffers.out.copy_(normed), total, scale_S)
    # 2. Rows of a view are read in place; a sum is formed of contiguous rows.
    if residual is not None:
        x, residual = x.contiguous(), residual.contiguous()
    rows, x = _rows(x)
    weight_H = weight_H.contiguous()
    normed = x.new_empty(x.shape) if buffers.out is None else buffers.out
    total = x
    if residual is not None:
        total = x.new_empty(x.shape) if buffers.sum_out is None else buffers.sum_out
    scale_S = x.new_empty(rows[0], dtype=wide_dtype(x)) if buffers.saves_scale else None
    log_launch("rms_norm_forward", "cpp")
    _C.rms_norm_forward(
        dtype,
        rows,
        output_strides(normed),
        x.data_ptr(),
        address(residual),
        weight_H.data_ptr(),
        normed.data_ptr(),
        0 if residual is None else total.data_ptr(),
        address(scale_S),
        eps,
        torch.get_num_threads(),
    )
    hold(x, residual, weight_H, normed, total, scale_S)
    return Forward(normed, total, scale_S)


def _backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight_H: Tensor, scale_S: Tensor, weighted: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = dtype_name(grad, grad_total, total, weight_H)
    if dtype is None:
        wide = wide_dtype(total, weight_H)
        widened = None if grad_total is None else grad_total.to(wide)
        grad_x, grad_weight_H = _backward(grad.to(wide), widened, total.to(wide), weight_H.to(wide), scale_S, weighted)
        narrow = None if grad_weight_H is None else saturating_cast(grad_weight_H, weight_H.dtype)
        return saturating_cast(grad_x, total.dtype), narrow
    rows, total = _rows(total)
    grad, weight_H = grad.contiguous(), weight_H.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x = total.new_empty(total.shape)
    grad_weight_H = scale_S.new_empty(rows[1]) if weighted else None
    log_launch("rms_norm_backward", "cpp")
    _C.rms_norm_backward(
        dtype,
        rows,
        grad.data_ptr(),
        address(grad_total),
        total.data_ptr(),
        weight_H.data_ptr(),
        scale_S.data_ptr(),
        grad_x.data_ptr(),
        address(grad_weight_H),
        torch.get_num_threads(),
    )
    hold(grad, grad_total, total, weight_H, scale_S, grad_x, grad_weight_H)
    return grad_x, None if grad_weight_H is None else grad_weight_H.to(weight_H.dtype)


def _rows(x: Tensor) -> tuple[tuple[int, int, int, int, int], Tensor]:
    """Return (rows, width, and how rows lie), and x itself or a contiguous copy."""
    strides = row_strides(x)
    if strides is None:
        x = x.contiguous()
        strides = (max(1, x.numel() // max(1, x.shape[-1])), 0, x.shape[-1])
    width = x.shape[-1]
    return (x.numel() // width if width else 0, width, *strides), x


_STEPS = Steps(_forward, _backward)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, out: Tensor | None) -> Tensor:
    """Return the norm of the rows of x; see the public function."""
    return run(_STEPS, x, None, weight_H, eps, out)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor, eps: float, out: Tensor | None, sum_out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the norm of x + residual, and the sum; see the public function."""
    return run(_STEPS, x, residual, weight_H, eps, out, sum_out)
