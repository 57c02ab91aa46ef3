"""Rewards of responses by prompt, over all ranks: counts, deviations from the mean, standard deviations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Rewards of a group that differ by less, over the largest, are equal: a reward model in fp32 gives equal texts such
# scores in different micro-batches. Divided by their standard deviation they would be advantages of 1.
_LEAST_RELATIVE_SPREAD = 1e-6


@dataclass(frozen=True)
class Groups:
    """The rewards of N responses to G prompts; responses that do not count take no part.

    Attributes:
        reward_N: float64.
        group_N: int64, the prompt of each response, from 0 to G - 1.
        counts_N: bool.
        n_groups: G.
    """

    reward_N: Tensor
    group_N: Tensor
    counts_N: Tensor
    n_groups: int

    @cached_property
    def count_G(self) -> Tensor:
        """Number of responses that count, float64."""
        return self._sum(self.counts_N.double())

    @cached_property
    def has_spread_G(self) -> Tensor:
        """Whether the rewards that count differ by more than the rounding of fp32."""
        high_G = self._extreme("amax")
        spread_G = high_G - self._low_G
        return spread_G > _LEAST_RELATIVE_SPREAD * torch.maximum(high_G.abs(), self._low_G.abs())

    @cached_property
    def deviation_N(self) -> Tensor:
        """Reward less the mean of the group; exactly 0 where the group has no spread or the response does not count."""
        # From the group's smallest reward on, equal rewards have deviations of exactly 0, and nothing cancels.
        above_N = torch.where(self._varies_N, self.reward_N - self._low_G[self.group_N], 0.0)
        mean_G = self._sum(above_N) / self.count_G.clamp(min=1)
        return torch.where(self._varies_N, above_N - mean_G[self.group_N], 0.0)

    @cached_property
    def std_G(self) -> Tensor:
        """Population standard deviation of each group; 0 without a spread."""
        return (self._sum(self.deviation_N.square()) / self.count_G.clamp(min=1)).sqrt()

    @cached_property
    def batch_std(self) -> Tensor:
        """Population standard deviation of all rewards that count, 0-dim."""
        counted = self.reward_N[self.counts_N]
        return counted.std(correction=0) if counted.numel() else counted.new_zeros(())

    @cached_property
    def _low_G(self) -> Tensor:
        return self._extreme("amin")

    @property
    def _varies_N(self) -> Tensor:
        return self.counts_N & self.has_spread_G[self.group_N]

    def _sum(self, x_N: Tensor) -> Tensor:
        return torch.zeros(self.n_groups, dtype=torch.float64).index_add(0, self.group_N, x_N)

    def _extreme(self, kind: str) -> Tensor:
        counted = self.counts_N
        empty_G = torch.zeros(self.n_groups, dtype=torch.float64)
        return empty_G.scatter_reduce(0, self.group_N[counted], self.reward_N[counted], kind, include_self=False)
