"""The meaning of value_loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.statistics import masked_sums, to_float64, with_neutral
from ..types import ValueLoss, ValueStats
from ..validate import wide_dtype


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
    dtype = wide_dtype(value_A, old_value_A, return_A)
    keep_A = torch.ones_like(value_A, dtype=torch.bool) if mask_A is None else mask_A != 0

    def kept(x_A):
        return torch.where(keep_A, x_A, 0).to(dtype)

    value_A, return_A = kept(value_A), kept(return_A)
    weight_A = keep_A.to(dtype) if weight_A is None else kept(weight_A)
    error_A = return_A - value_A
    worst_A = error_A.square()
    clipped_A = torch.zeros_like(keep_A)
    if clip is not None:
        old_A = kept(old_value_A)
        bounded_A = (old_A + (value_A - old_A).clamp(-clip, clip) - return_A).square()
        clipped_A = bounded_A > worst_A
        worst_A = torch.where(clipped_A, bounded_A, worst_A)
    loss_A = 0.5 * worst_A * weight_A
    loss = loss_A.sum() / normalizer
    with torch.no_grad():
        columns = {
            "count": keep_A,
            "weight_sum": weight_A,
            "loss_sum": loss_A,
            "clipped_sum": clipped_A,
            "value_sum": value_A,
            "value_sq_sum": value_A.square(),
            "return_sum": return_A,
            "return_sq_sum": return_A.square(),
            "error_sum": error_A,
            "error_sq_sum": error_A.square(),
        }
        extremes = {
            "value_min": with_neutral(value_A, keep_A, torch.inf).amin(),
            "value_max": with_neutral(value_A, keep_A, -torch.inf).amax(),
        }
        stats = ValueStats(**masked_sums(columns, keep_A), **to_float64(extremes))
    return ValueLoss(loss.to(dtype), stats)
