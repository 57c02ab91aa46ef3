"""value_loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.precision import widen
from ..common.statistics import masked_sums, neutralize_masked, to_float64
from ..stats import ValueStats
from ..types import ValueLoss
from ..validate import wide_dtype
from ..whitening.reference import masked_moments
from .inputs import ValueStreams

# Legend: A, actions of the packed stream; every stream is [A].


def value_loss(value_A: Tensor, streams: ValueStreams, clip: float | None, normalizer: float | Tensor) -> ValueLoss:
    """Return the loss and its statistics; see the public function."""
    dtype = wide_dtype(value_A, streams.old_value_A, streams.return_A)
    keep_A = torch.ones_like(value_A, dtype=torch.bool) if streams.mask_A is None else streams.mask_A != 0

    def masked(x_A: Tensor) -> Tensor:
        # Select, do not multiply: 0 * NaN is NaN.
        return widen(torch.where(keep_A, x_A, 0), dtype)

    # 1. Squared error, and that of the clipped value where it is larger.
    value_A, return_A = masked(value_A), masked(streams.return_A)
    weight_A = keep_A.to(dtype) if streams.weight_A is None else masked(streams.weight_A)
    error_A = return_A - value_A
    worst_A = error_A.square()
    clipped_A = torch.zeros_like(keep_A)
    if clip is not None and streams.old_value_A is not None:
        old_A = masked(streams.old_value_A)
        bounded_A = (old_A + _clipped(value_A - old_A, clip) - return_A).square()
        # An old value of NaN compares as false, and must make loss and gradient NaN.
        clipped_A = (bounded_A > worst_A) | old_A.isnan()
        worst_A = torch.where(clipped_A, bounded_A, worst_A)
    loss_A = 0.5 * worst_A * weight_A
    loss = loss_A.sum() / normalizer
    # 2. Statistics.
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
            "value_min": neutralize_masked(value_A, keep_A, torch.inf).amin(),
            "value_max": neutralize_masked(value_A, keep_A, -torch.inf).amax(),
        }
        # Squares of deviations are taken about the mean: sums of squares lose a spread that is small beside it.
        squares = {
            "return_m2": masked_moments(return_A, keep_A).m2,
            "error_m2": masked_moments(error_A, keep_A).m2,
        }
        stats = ValueStats(**masked_sums(columns, keep_A), **to_float64(extremes), **squares)
    return ValueLoss(loss.to(dtype), stats)


def _clipped(x: Tensor, clip: float) -> Tensor:
    # Not clamp: its gradient at NaN is 0.
    return torch.where(x > clip, clip, torch.where(x < -clip, -clip, x))
