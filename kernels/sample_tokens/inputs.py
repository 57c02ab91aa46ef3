"""Inputs of sample_tokens beside logits and shard, and what a rank knows about a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """How logits become the distribution that is sampled. Temperature 0 takes the arg-max and ignores the rest."""

    temperature: float
    top_k: int  # 0: all columns
    top_p: float  # 1: all mass

    @property
    def truncates(self) -> bool:
        """Whether top_k or top_p can drop a column."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)

    @property
    def scale(self) -> float:
        """What divides the logits: the temperature, and 1 where that is 0."""
        return self.temperature or 1.0


@dataclass(frozen=True)
class NoiseKey:
    """Names the noise of each row: it is a hash of seed, sequence id, position and global vocabulary id."""

    seed: int
    sequence_ids: Tensor  # [N] int
    positions: Tensor  # [N] int


class Draw(NamedTuple):
    """One rank's candidate for each row, from its own columns [N]."""

    perturbed: Tensor  # the best perturbed logit, fp64
    token: Tensor  # its global id; the largest int64 if the rank has no column
    logit: Tensor  # its plain logit
    logsumexp: Tensor  # log-sum-exp of this rank's logits over the temperature, fp64
