"""Regression of a value model on given returns, and the variance of returns that it explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.data.rollouts import ValueExample
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.kernels import Moments, masked_moments, value_loss
from icegrt.metrics.statistics import has_spread
from icegrt.packing import PackedBatch, Share, pack
from icegrt.roles.micro_batch import LossOutput
from icegrt.roles.role import Role

# Micro-batches per scoring pass: held-out data may be packed on access, and must not be in memory as a whole.
_EVALUATION_BATCHES = 256


@dataclass(frozen=True, eq=False)
class ValueBatch(PackedBatch):
    """A micro-batch with the return of every action. return_A: [A] float32."""

    return_A: Tensor


@dataclass(frozen=True)
class ValueQuality:
    """Errors of values over a set of actions: moments of the returns, and of returns - values."""

    returns: Moments
    errors: Moments

    @classmethod
    def of(cls, value_A: Tensor, return_A: Tensor) -> ValueQuality:
        """Return the moments of [A] values and returns, in fp64."""
        return_A = return_A.double()
        return cls(masked_moments(return_A), masked_moments(return_A - value_A.double()))

    def merge(self, other: ValueQuality) -> ValueQuality:
        """Return the moments over both sets."""
        return ValueQuality(self.returns.merge(other.returns), self.errors.merge(other.errors))

    @property
    def loss(self) -> float:
        """Half the mean squared error."""
        return 0.5 * float(self.errors.variance + self.errors.mean.square())

    @property
    def explained_variance(self) -> float:
        """1 - var(returns - values) / var(returns); 0 if the returns do not vary."""
        if not has_spread(float(self.returns.mean), float(self.returns.variance.sqrt())):
            return 0.0
        return 1.0 - float(self.errors.variance / self.returns.variance)


@dataclass(frozen=True)
class ValueRegressionLoss:
    """Half the squared error of the values against the returns, summed; counted per action."""

    role: Role

    def __call__(self, hidden_TH: Tensor, batch: ValueBatch) -> LossOutput:
        value_A = self.role.model.head(hidden_TH[batch.action_rows_A])
        out = value_loss(value_A, None, batch.return_A, clip=None, normalizer=1.0)
        return LossOutput(out.loss, batch.n_counted_actions, ValueQuality.of(value_A.detach(), batch.return_A))


def pack_value_examples(
    examples: Sequence[ValueExample], token_budget: int, share: Share | None = None
) -> list[ValueBatch]:
    """Pack this rank's share of the examples (None: all) into micro-batches of at most `token_budget` tokens."""
    share = share or Share()
    micro_batches = share.assign([len(e) for e in examples], token_budget)[share.rank]
    return [pack_group([examples[i] for i in members], share.tail_multiple) for members in micro_batches]


def pack_group(group: list[ValueExample], tail_multiple: int = 1) -> ValueBatch:
    """Pack examples into one micro-batch."""
    return_A = torch.tensor([x for e in group for x in e.returns], dtype=torch.float32)
    batch = pack([e.prompt for e in group], [e.response for e in group], tail_multiple=tail_multiple)
    return batch.extended(ValueBatch, return_A=return_A)


def evaluate_values(role: Role, batches: Sequence[ValueBatch], cluster: Cluster) -> ValueQuality:
    """Return the quality of the values of all data-parallel ranks' batches. Collective."""

    def read(hidden_TH: Tensor, batch: ValueBatch) -> tuple[Tensor]:
        return (role.model.head(hidden_TH[batch.action_rows_A]),)

    nothing = torch.zeros(0)
    quality = ValueQuality.of(nothing, nothing)
    for start in range(0, len(batches), _EVALUATION_BATCHES):
        part = batches[start : start + _EVALUATION_BATCHES]
        values = fetch([value_A for (value_A,) in role.score(part, read, lambda batch: (batch.n_actions,))])
        for value_A, batch in zip(values, part, strict=True):
            quality = quality.merge(ValueQuality.of(value_A, batch.return_A))
    return reduced(quality, cluster)


def reduced(quality: ValueQuality, cluster: Cluster) -> ValueQuality:
    """Return the quality over all data-parallel ranks. Collective."""
    group = cluster.data_group
    return ValueQuality(quality.returns.reduce(group), quality.errors.reduce(group))
