"""Casts between the dtype of an input and the wide dtype: gradients in fp16 saturate instead of becoming infinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in dtype. In fp16, numbers beyond its range become its largest number of their sign; NaN stays NaN."""
    if dtype != torch.float16:
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


class _WidenHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        return saturating_cast(upstream[0], torch.float16), None


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in the wide dtype; the gradient of an fp16 input saturates."""
    wide: Tensor = _WidenHalf.apply(x, dtype) if x.dtype == torch.float16 else x.to(dtype)
    return wide
