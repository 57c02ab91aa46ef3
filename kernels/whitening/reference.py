"""masked_moments and whiten in plain PyTorch. x and mask have any shape; moments are 0-dim fp64 tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..stats import Moments
from ..validate import wide_dtype


def whiten(x: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Return x whitened by `moments`; see the public function."""
    dtype = wide_dtype(x)
    mean, scale = moments.mean.to(dtype), torch.rsqrt(moments.variance + eps).to(dtype)
    white = (x.to(dtype) - mean) * scale
    return white if shift_mean else white + mean


def masked_moments(x: Tensor, mask: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Moments:
    """Return the moments of the unmasked entries; see the public function."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    # Two passes in fp64: the sum of squares minus the squared mean would cancel.
    wide = torch.where(keep, x, 0).to(torch.float64)
    count = keep.sum().to(torch.float64)
    mean = wide.sum() / count.clamp(min=1)
    m2 = torch.where(keep, wide - mean, 0).square().sum()
    local = Moments(count, mean, m2)
    return local if group is None else local.reduce(group)
