"""What a response is worth: the reward model's score normalised, the function's score, the penalty for no EOS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.kernels import Moments, masked_moments

# Scores that all agree have no spread to divide by.
_LEAST_STD = 1e-6


class ScoreScaling:
    """Running moments of the reward model's scores over all ranks and iterations (Chan's rule, fp64).

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


@dataclass(frozen=True)
class Scores:
    """Per response, [N] float32 each: the parts as they were given, and the total that PPO is paid."""

    total_N: Tensor
    reward_model_N: Tensor | None
    function_N: Tensor | None

    def select(self, index: list[int]) -> Scores:
        """The scores of some responses."""
        parts = (self.total_N, self.reward_model_N, self.function_N)
        return Scores(*(None if part is None else part[index] for part in parts))


def combine(
    config: PPOConfig,
    scaling: ScoreScaling,
    reward_model_N: Tensor | None,
    function_N: Tensor | None,
    truncated_N: Tensor,
) -> Scores:
    """weight * normalised reward-model score + weight * function score - penalty where truncated."""
    total_N = torch.zeros(truncated_N.shape[0])
    if reward_model_N is not None:
        total_N = total_N + config.reward_model_weight * scaling.apply(reward_model_N)
    if function_N is not None:
        total_N = total_N + config.reward_function_weight * function_N
    return Scores(total_N - config.missing_eos_penalty * truncated_N, reward_model_N, function_N)
