"""What a response is worth: reward models' scores normalised, what functions pay, the penalty for no EOS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.kernels import Moments, masked_moments

# Scores that all agree have no spread to divide by.
_LEAST_STD = 1e-6


class RunningScoreNormalizer:
    """Running moments of one reward model's scores over all ranks and iterations (Chan's rule, fp64).

    score' = clip((score - shift * mean) / std, -c, c). The moments take in an iteration's scores before they are
    applied to them. `start` gives statistics that were saved with the reward model; without them, and before the first
    iteration, scores are taken as they are.
    """

    def __init__(self, config: PPOConfig, start: dict[str, float] | None = None) -> None:
        self.scale, self.shift, self.clip = config.score_scale, config.score_shift, config.score_clip
        zero = torch.zeros((), dtype=torch.float64)
        self.moments = Moments(zero, zero, zero)
        if start is not None:
            self.moments = _moments(start["count"], start["mean"], start["std"])

    @property
    def factor(self) -> float:
        """What scores are multiplied by; 1 where nothing is known of them yet."""
        if not (self.scale and self.moments.count > 0):
            return 1.0
        return 1.0 / max(self.moments.variance.sqrt().item(), _LEAST_STD)

    def update(self, score_N: Tensor, group: dist.ProcessGroup | None) -> None:
        """Take in an iteration's scores, reduced over `group`."""
        self.moments = self.moments.merge(masked_moments(score_N.double().cpu(), group=group))

    def apply(self, score_N: Tensor) -> Tensor:
        """Normalised and clipped scores, [N] float32; the given tensor stays as it is."""
        score_N = score_N.double()
        if self.shift:
            score_N = score_N - self.moments.mean.item()
        score_N = score_N * self.factor
        if self.clip:
            score_N = score_N.clamp(-self.clip, self.clip)
        return score_N.float()

    def state(self) -> dict[str, Any]:
        m = self.moments
        return {"count": m.count.item(), "mean": m.mean.item(), "m2": m.m2.item()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.moments = Moments(*(torch.tensor(state[k], dtype=torch.float64) for k in ("count", "mean", "m2")))


def _moments(count: float, mean: float, std: float) -> Moments:
    return Moments(*(torch.tensor(x, dtype=torch.float64) for x in (count, mean, std * std * count)))


class RunningScoreNormalizers(dict[str, RunningScoreNormalizer]):
    """A scaling for each reward model, by its name."""

    def state(self) -> dict[str, Any]:
        """By name, as JSON."""
        return {name: scaling.state() for name, scaling in self.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state()` back. Raises `ConfigError` where it is of other reward models: nobody knows whose
        moments are whose."""
        if set(state) != set(self):
            saved, ours = (", ".join(names) or "none" for names in (state, self))
            raise ConfigError(
                f"the checkpoint has score statistics of the reward models {saved}; this run has {ours}. Name the "
                "same models (ppo.reward_model, ppo.reward.sources), or start a new run from the checkpoint's actor"
            )
        for name, scaling in self.items():
            scaling.load_state(state[name])


@dataclass(frozen=True)
class ModelScores:
    """What one reward model said of N responses, in their order: raw scores, [N] float32."""

    name: str
    weight: float
    score_N: Tensor


@dataclass(frozen=True)
class Scores:
    """Per response, [N] float32 each: the parts as they were given, and the total that PPO is paid.

    paid_N: the weighted sum of what functions and HTTP scorers said. The total of a dropped response is 0.
    """

    total_N: Tensor
    models: Sequence[ModelScores]
    source_total_N: Tensor | None


def total_scores(
    config: PPOConfig,
    normalizers: Mapping[str, RunningScoreNormalizer],
    models: Sequence[ModelScores],
    source_total_N: Tensor | None,
    truncated_N: Tensor,
    dropped_N: Tensor | None = None,
) -> Scores:
    """Sum of weight * normalised score over reward models + what functions and scorers pay - penalty if truncated."""
    total_N = torch.zeros(truncated_N.shape[0])
    for model in models:
        total_N = total_N + model.weight * normalizers[model.name].apply(model.score_N)
    if source_total_N is not None:
        total_N = total_N + source_total_N
    total_N = total_N - config.missing_eos_penalty * truncated_N
    return Scores(total_N if dropped_N is None else total_N.masked_fill(dropped_N, 0.0), models, source_total_N)
