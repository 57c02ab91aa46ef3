"""What a pass over micro-batches takes and returns: a batch with its loss, the loss's sum, statistics that merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from icegrt.packing import PackedBatch


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch.

    Attributes:
        sum: 0-dim, differentiable; the loss summed over the entries that count.
        count: number of those entries. The gradient of a step is that of all sums over all counts.
        stats: detached statistics with `merge(other)`, or None.
    """

    sum: Tensor
    count: int
    stats: Any = None


@dataclass(frozen=True)
class MicroBatch:
    """One work item of an optimizer step: a batch on the CPU, and `loss(hidden_TH, batch)` with both on the device."""

    batch: PackedBatch
    loss: Callable[[Tensor, Any], LossOutput]


def merge_by_type(stats: Iterable[Any]) -> dict[type, Any]:
    """Merge statistics with those of the same type, in order. Returns one total per type."""
    totals: dict[type, Any] = {}
    for part in stats:
        kind = type(part)
        totals[kind] = totals[kind].merge(part) if kind in totals else part
    return totals
