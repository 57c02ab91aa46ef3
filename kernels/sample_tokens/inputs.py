"""Inputs of sample_tokens beside logits and shard, and what a rank knows about a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """How logits become the distribution that is sampled. Temperature 0 takes the arg-max and does not truncate.

    A setting is a number, or a tensor [N] with one for each row. What a tensor contains is not known to the host: it
    counts as a setting that truncates.
    """

    temperature: float | Tensor  # fp32
    top_k: int | Tensor = 0  # int32; 0: all columns
    top_p: float | Tensor = 1.0  # fp32; 1: all mass
    min_p: float | Tensor = 0.0  # fp32; 0: all columns
    allowed_NW: Tensor | None = None  # int32, a bit for each global id; None: all

    @property
    def noisy(self) -> bool:
        """Whether a row may have a temperature above 0."""
        return isinstance(self.temperature, Tensor) or self.temperature > 0

    @property
    def cuts_top_k(self) -> bool:
        """Whether top_k may drop a column."""
        return self.noisy and (isinstance(self.top_k, Tensor) or self.top_k > 0)

    @property
    def cuts_top_p(self) -> bool:
        """Whether top_p may drop a column."""
        return self.noisy and (isinstance(self.top_p, Tensor) or self.top_p < 1.0)

    @property
    def cuts_min_p(self) -> bool:
        """Whether min_p may drop a column."""
        return self.noisy and (isinstance(self.min_p, Tensor) or self.min_p > 0)

    @property
    def truncates(self) -> bool:
        """Whether a setting may drop a column."""
        return self.cuts_top_k or self.cuts_top_p or self.cuts_min_p

    @property
    def scale(self) -> float | Tensor:
        """What divides the logits: the temperature, and 1 where that is 0."""
        if isinstance(self.temperature, Tensor):
            return torch.where(self.temperature > 0, self.temperature, 1.0)
        return self.temperature or 1.0

    def without_truncation(self) -> Distribution:
        """Return the same temperature over all columns."""
        return Distribution(self.temperature)

    def effective(self, setting: float | Tensor, neutral: float) -> float | Tensor:
        """Return a setting, with `neutral` in rows of temperature 0."""
        if isinstance(self.temperature, Tensor):
            return torch.where(self.temperature > 0, setting, neutral)
        return setting


@dataclass(frozen=True)
class NoiseKey:
    """Names the noise of each row: it is a hash of seed, sequence id, position and global vocabulary id."""

    seed: int | Tensor  # [N] int64
    sequence_ids: Tensor  # [N] int
    positions: Tensor  # [N] int

    @property
    def signed_seed(self) -> int | Tensor:
        """The seed; of a number the signed integer with the bits of the seed modulo 2^64."""
        return self.seed if isinstance(self.seed, Tensor) else (self.seed + (1 << 63)) % (1 << 64) - (1 << 63)


class Draw(NamedTuple):
    """One rank's candidate for each row, from its own columns [N]."""

    perturbed: Tensor  # the best perturbed logit, fp64
    token: Tensor  # its global id; the largest int64 if the rank has no column
    logit: Tensor  # its plain logit
    logsumexp: Tensor  # log-sum-exp of this rank's logits over the temperature, fp64


def column(x: float | Tensor) -> float | Tensor:
    """Return a setting as it broadcasts over the columns of its row."""
    return x[:, None] if isinstance(x, Tensor) else x


def deliver(token_N: Tensor, logprob_N: Tensor, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return results, in the caller's buffers if there are any."""
    if out is None:
        return token_N, logprob_N
    return out[0].copy_(token_N), out[1].copy_(logprob_N)
