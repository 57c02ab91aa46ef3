"""Sums, counts and extremes over the unmasked entries of a stream."""

from __future__ import annotations

import torch
from torch import Tensor

# Legend: A, actions of the packed stream. Every input is [A]; every result is a 0-dim fp64 tensor.


def masked_sums(columns: dict[str, Tensor], keep_A: Tensor) -> dict[str, Tensor]:
    """Return the fp64 sum of each column over the entries that `keep_A` keeps."""
    # One stacked table needs one reduction, not one for each statistic.
    table = torch.stack([c.to(torch.float64) for c in columns.values()])
    sums = torch.where(keep_A, table, 0).sum(dim=1)
    return dict(zip(columns, sums.unbind(), strict=True))


def neutralize_masked(x_A: Tensor, keep_A: Tensor, neutral: float) -> Tensor:
    """Return x_A [A + 1] with `neutral` at masked entries and at the end, so that an empty stream has an extreme."""
    return torch.cat([torch.where(keep_A, x_A, neutral), x_A.new_full((1,), neutral)])


def to_float64(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values in fp64."""
    return {name: value.to(torch.float64) for name, value in values.items()}
