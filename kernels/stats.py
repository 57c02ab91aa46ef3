"""Statistics of streams that merge over micro-batches and ranks: moments of a set, and sums over counted tokens.

Statistics are sums, counts and extremes, never means. Sums merge over micro-batches and ranks without weights; a mean
of means is wrong as soon as two micro-batches differ in length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .common.collectives import communication_device

# A standard deviation below this share of the mean is rounding: means of fp64 sums are off by about 1e-16 of it.
SPREAD_FLOOR = 1e-12


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of numbers.

        variance = m2 / count

    Source of `merge`: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances".

    Attributes:
        count: Numbers in the set, 0-dim fp64.
        mean: Their mean, 0-dim fp64; 0 for an empty set.
        m2: Sum of their squared deviations from the mean, 0-dim fp64.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance; 0 for an empty set."""
        return self.m2 / self.count.clamp(min=1)

    @property
    def varies(self) -> Tensor:
        """Whether the numbers differ by more than the rounding of fp64, 0-dim bool; False for an empty set.

            variance > (SPREAD_FLOOR * mean)^2

        Kernels take fp64, in which 1e6 +- 1e-3 is a spread. A caller that knows its numbers to be fp32 needs a higher
        floor, as equal numbers differ by 1e-7 of the mean there.
        """
        # Negated: the moments of NaN vary, so that what is divided by them is NaN.
        return ~(self.variance <= (SPREAD_FLOOR * self.mean).square())

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the union of two disjoint sets.

            mean = mean_1 + delta * count_2 / count
            m2 = m2_1 + m2_2 + delta^2 * count_1 * count_2 / count

        with delta = mean_2 - mean_1 and count = count_1 + count_2.

        Args:
            other: Moments of the second set, on the same device.

        Returns:
            Moments of both sets.
        """
        count = self.count + other.count
        # Two empty sets merge to an empty set, not to NaN.
        safe = count.clamp(min=1)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / safe)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / safe)
        return Moments(count, mean, m2)

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments on another device. A kernel reads them on the device of its other arguments.

        Args:
            device: The device to copy to.

        Returns:
            Moments on `device`.
        """
        return Moments(self.count.to(device), self.mean.to(device), self.m2.to(device))

    def reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Return the moments over all ranks of a group, the same bits on every rank.

        A collective: ranks without elements call with a count of 0.

        Args:
            group: Process group. None: the default group.

        Returns:
            Moments of the union.
        """
        packed = torch.stack([self.count, self.mean, self.m2])
        packed = packed.to(communication_device(group, packed.device))
        parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, packed, group=group)
        parts = [part.to(self.count.device) for part in parts]
        # Merged in rank order: an all-reduce would add in an order of its own.
        total = Moments(*parts[0].unbind())
        for part in parts[1:]:
            total = total.merge(Moments(*part.unbind()))
        return total


_MIN, _MAX = {"merge": "min"}, {"merge": "max"}


def _squares_about_mean(sum_name: str) -> dict[str, str]:
    # Metadata of a sum of squared deviations from the mean of the numbers that add up to the field `sum_name`.
    return {"merge": "m2", "sum": sum_name}


_Stats = TypeVar("_Stats", bound="_Mergeable")


@dataclass(frozen=True)
class _Mergeable:
    """merge and reduce for a dataclass of 0-dim tensors: fields add up unless their metadata names min, max or m2.

    A field with m2 is a sum of squared deviations from the mean and merges as that of `Moments`.
    """

    count: Tensor

    def merge(self: _Stats, other: _Stats) -> _Stats:
        """Return the statistics of two disjoint sets of tokens together.

        Args:
            other: Statistics of the same class, on the same device.

        Returns:
            Statistics of both.

        Raises:
            TypeError: The classes differ.
        """
        if type(other) is not type(self):
            raise TypeError(f"merge: expected {type(self).__name__}, got {type(other).__name__}")
        join: dict[str, Callable[[Tensor, Tensor], Tensor]]
        join = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum, "m2": torch.add}
        values = {
            f.name: join[f.metadata.get("merge", "sum")](getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)
        }
        # Squared deviations from two means become those from the common mean.
        for name, sum_name in self._squares().items():
            mean = values[sum_name] / values["count"].clamp(min=1)
            values[name] = self._squares_about(name, sum_name, mean) + other._squares_about(name, sum_name, mean)
        return type(self)(**values)

    def reduce(self: _Stats, group: dist.ProcessGroup | None = None) -> _Stats:
        """Return the statistics over all ranks of a group. A collective: ranks without tokens call too.

        Args:
            group: Process group. None: the default group.

        Returns:
            Statistics of all ranks' tokens.
        """
        rules = {f.name: f.metadata.get("merge", "sum") for f in fields(self)}
        sums = [n for n, rule in rules.items() if rule == "sum"]
        extremes = [n for n, rule in rules.items() if rule in ("min", "max")]
        values = dict(zip(sums, _all_reduce([getattr(self, n) for n in sums], dist.ReduceOp.SUM, group), strict=True))
        if extremes:
            # One collective serves both extremes: the minimum is the negated maximum of the negation.
            signed = [-getattr(self, n) if rules[n] == "min" else getattr(self, n) for n in extremes]
            reduced = _all_reduce(signed, dist.ReduceOp.MAX, group)
            values |= {n: -v if rules[n] == "min" else v for n, v in zip(extremes, reduced, strict=True)}
        squares = self._squares()
        if squares:
            # Each rank moves its squared deviations to the mean of all ranks; then they add up.
            means = {name: values[sum_name] / values["count"].clamp(min=1) for name, sum_name in squares.items()}
            moved = [self._squares_about(name, sum_name, means[name]) for name, sum_name in squares.items()]
            values |= dict(zip(squares, _all_reduce(moved, dist.ReduceOp.SUM, group), strict=True))
        return type(self)(**values)

    def _squares(self) -> dict[str, str]:
        """Return the fields of squared deviations, each with the field of the sum that belongs to it."""
        return {f.name: f.metadata["sum"] for f in fields(self) if f.metadata.get("merge") == "m2"}

    def _squares_about(self, name: str, sum_name: str, mean: Tensor) -> Tensor:
        """Return the squared deviations of this set from another mean."""
        delta = getattr(self, sum_name) / self.count.clamp(min=1) - mean
        squares: Tensor = getattr(self, name) + self.count * delta * delta
        return squares


def _all_reduce(values: Sequence[Tensor], op: Any, group: dist.ProcessGroup | None) -> list[Tensor]:
    # One collective for all values, however many they are.
    stacked = torch.stack(list(values))
    packed = stacked.to(communication_device(group, stacked.device))
    dist.all_reduce(packed, op=op, group=group)
    return list(packed.to(stacked.device).unbind())


@dataclass(frozen=True)
class PolicyStats(_Mergeable):
    """Sums over the counted (unmasked) tokens of a policy loss, 0-dim fp64 tensors. Only *loss_sum carry weight_A.

    kl_old_new_sum is k3 of log p_new - log p_old seen from the old policy:

        kl_old_new = (ratio - 1) - log ratio

    Source: Schulman, "Approximating KL Divergence", 2020.
    """

    weight_sum: Tensor
    loss_sum: Tensor  # the objective with all its terms, before the normalizer
    policy_loss_sum: Tensor  # its clipped-surrogate part
    clipped_sum: Tensor  # tokens whose gradient the clip removed
    clipped_low: Tensor  # of those, ratio < 1 - clip_low
    clipped_high: Tensor  # of those, ratio > 1 + clip_high
    dual_clipped_sum: Tensor
    kl_old_new_sum: Tensor
    ratio_sum: Tensor
    entropy_sum: Tensor  # 0 where no entropy was given
    ref_kl_sum: Tensor  # value of kl_estimator; 0 where no reference was given
    logprob_sum: Tensor
    advantage_sum: Tensor  # after whitening
    advantage_sq_sum: Tensor
    ratio_min: Tensor = field(metadata=_MIN)  # +inf when empty
    ratio_max: Tensor = field(metadata=_MAX)  # -inf when empty
    logprob_diff_abs_max: Tensor = field(metadata=_MAX)  # max |logprob - old_logprob|; 0 when empty


@dataclass(frozen=True)
class ValueStats(_Mergeable):
    """Sums over the counted (unmasked) tokens of a value loss, 0-dim fp64 tensors. Only loss_sum carries weight_A.

    error = return - value
    """

    weight_sum: Tensor
    loss_sum: Tensor
    clipped_sum: Tensor  # tokens whose gradient the clip removed
    value_sum: Tensor
    value_sq_sum: Tensor
    return_sum: Tensor
    return_sq_sum: Tensor
    error_sum: Tensor
    error_sq_sum: Tensor
    value_min: Tensor = field(metadata=_MIN)
    value_max: Tensor = field(metadata=_MAX)
    return_m2: Tensor = field(metadata=_squares_about_mean("return_sum"))  # squared deviations from their mean
    error_m2: Tensor = field(metadata=_squares_about_mean("error_sum"))

    @property
    def explained_variance(self) -> Tensor:
        """1 - var(return - value) / var(return), 0-dim fp64; 0 if the returns do not vary (see `Moments.varies`)."""
        n = self.count.clamp(min=1)
        returns = Moments(self.count, self.return_sum / n, self.return_m2)
        explained = 1 - self.error_m2 / torch.where(returns.varies, self.return_m2, 1.0)
        return torch.where(returns.varies, explained, 0.0)
