"""Sums, counts and extremes over the unmasked entries of a stream."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sums(columns: dict[str, Tensor], keep_A: Tensor) -> dict[str, Tensor]:
    table = torch.stack([c.to(torch.float64) for c in columns.values()])
    sums = torch.where(keep_A, table, 0).sum(dim=1)
    return dict(zip(columns, sums.unbind(), strict=True))


def with_neutral(x_A: Tensor, keep_A: Tensor, empty: float) -> Tensor:
    """x_A with masked entries neutral for a minimum or maximum, and one more so that an empty stream has an answer."""
    return torch.cat([torch.where(keep_A, x_A, empty), x_A.new_full((1,), empty)])


def to_float64(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.float64) for name, value in values.items()}
