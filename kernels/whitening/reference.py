"""The meaning of masked_moments and whiten in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Moments
from ..validate import wide_dtype


def whiten(x: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    dtype = wide_dtype(x)
    mean, scale = moments.mean.to(dtype), torch.rsqrt(moments.variance + eps).to(dtype)
    white = (x.to(dtype) - mean) * scale
    return white if shift_mean else white + mean


def masked_moments(x: Tensor, mask: Tensor | None = None, group=None) -> Moments:
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    wide = torch.where(keep, x, 0).to(torch.float64)
    count = keep.sum().to(torch.float64)
    mean = wide.sum() / count.clamp(min=1)
    m2 = torch.where(keep, wide - mean, 0).square().sum()
    mine = Moments(count, mean, m2)
    return mine if group is None else mine.reduce(group)
