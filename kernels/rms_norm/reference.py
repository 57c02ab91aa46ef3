"""The root-mean-square norm in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.precision import widen
from ..validate import wide_dtype


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Return the norm of the rows of x; see the public function."""
    dtype = wide_dtype(x, weight_H)
    wide = widen(x, dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale * widen(weight_H, dtype)
    return normed.to(x.dtype).contiguous() if out is None else out.copy_(normed)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight_H: Tensor,
    eps: float,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum; see the public function."""
    total = (x + residual).contiguous() if sum_out is None else torch.add(x, residual, out=sum_out)
    return rms_norm(total, weight_H, eps, out), total
