"""The total score of a response: normalised reward-model scores, function scores, the penalty for a missing EOS."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.distributed.pipeline import fetch
from icegrt.errors import ConfigError
from icegrt.kernels import Moments, masked_moments
from icegrt.metrics.statistics import has_spread


class RunningScoreNormalizer:
    """Running moments of one reward model's scores over all ranks and iterations (Chan's rule, fp64).

        score' = clip((score - shift * mean) / std, -c, c)

    The moments are updated with an iteration's scores before these are normalised. `start`: statistics saved with the
    reward model. Scores are not divided while there are no moments, and if the scores so far have no spread.
    """

    def __init__(self, config: PPOConfig, start: dict[str, float] | None = None) -> None:
        self.scale, self.shift, self.clip = config.score_scale, config.score_shift, config.score_clip
        zero = torch.zeros((), dtype=torch.float64)
        self.moments = Moments(zero, zero, zero)
        if start is not None:
            self.moments = _moments(start["count"], start["mean"], start["std"])

    @property
    def factor(self) -> float:
        """The factor 1 / std; 1 if there are no moments, if they have no spread, or if scores are not scaled."""
        if not (self.scale and self.moments.count > 0):
            return 1.0
        std = self.moments.variance.sqrt().item()
        return 1.0 / std if has_spread(self.moments.mean.item(), std) else 1.0

    def update(self, score_N: Tensor, group: dist.ProcessGroup | None) -> None:
        """Merge an iteration's scores, on the device of the group, into the moments of all its ranks. Collective."""
        self.moments = self.moments.merge(fetch(masked_moments(score_N.double(), group=group)))

    def apply(self, score_N: Tensor) -> Tensor:
        """Return normalised and clipped scores, [N] float32."""
        score_N = score_N.double()
        if self.shift:
            score_N = score_N - self.moments.mean.item()
        score_N = score_N * self.factor
        if self.clip:
            score_N = score_N.clamp(-self.clip, self.clip)
        return score_N.float()

    def state(self) -> dict[str, Any]:
        """Return the moments for a checkpoint, as JSON."""
        m = self.moments
        return {"count": m.count.item(), "mean": m.mean.item(), "m2": m.m2.item()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.moments = Moments(*(torch.tensor(state[k], dtype=torch.float64) for k in ("count", "mean", "m2")))


def _moments(count: float, mean: float, std: float) -> Moments:
    return Moments(*(torch.tensor(x, dtype=torch.float64) for x in (count, mean, std * std * count)))


class RunningScoreNormalizers(dict[str, RunningScoreNormalizer]):
    """One normalizer per reward model, by name.

    Training pays scores of the running moments. Evaluations use the moments as they were at the first evaluation, so
    that equal raw scores have equal totals in all evaluations of a run.
    """

    _frozen: dict[str, RunningScoreNormalizer] | None = None

    def observe(
        self, models: Sequence[ModelScores], kept_N: Tensor, device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        """Merge the scores of this rank's responses `kept_N`, [N] bool, into the moments of all ranks. Collective."""
        for model in models:
            self[model.name].update(model.score_N[kept_N].to(device), group)

    def frozen(self) -> Mapping[str, RunningScoreNormalizer]:
        """Return the normalizers of evaluations; the first call fixes their moments."""
        if self._frozen is None:
            self._frozen = {name: copy.copy(normalizer) for name, normalizer in self.items()}
        return self._frozen

    def frozen_state(self) -> dict[str, Any] | None:
        """Return the moments of evaluations for a checkpoint, as JSON; None before the first evaluation."""
        return None if self._frozen is None else {name: norm.state() for name, norm in self._frozen.items()}

    def load_frozen_state(self, state: Mapping[str, Any] | None) -> None:
        """Restore `frozen_state()`. None, also of an older checkpoint: the next evaluation fixes the moments."""
        self._frozen = None
        if state is not None:
            for name, normalizer in self.frozen().items():
                normalizer.load_state(state[name])

    def state(self) -> dict[str, Any]:
        """Return the moments of all models for a checkpoint, as JSON."""
        return {name: normalizer.state() for name, normalizer in self.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`. Raises `ConfigError` if it belongs to other reward models."""
        if set(state) != set(self):
            saved, configured = (", ".join(names) or "none" for names in (state, self))
            raise ConfigError(
                f"the checkpoint has score statistics of the reward models {saved}; this run has {configured}. Name "
                "the same models (ppo.reward_model, ppo.reward.sources), or start a new run from the checkpoint's actor"
            )
        for name, normalizer in self.items():
            normalizer.load_state(state[name])


@dataclass(frozen=True)
class ModelScores:
    """Raw scores of one reward model, [N] float32, in the order of the responses."""

    name: str
    weight: float
    score_N: Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of N responses, [N] float32 each.

    Attributes:
        total_N: the total score, from which PPO's rewards come; 0 for a dropped response.
        models: raw scores of each reward model.
        source_total_N: weighted sum over functions and HTTP scorers; None without any.
        overlong_N: soft penalty of long responses, at least 0; None: there is none.
    """

    total_N: Tensor
    models: Sequence[ModelScores]
    source_total_N: Tensor | None
    overlong_N: Tensor | None = None


def overlong_penalty(config: PPOConfig, lengths_N: Tensor) -> Tensor:
    """Return the soft penalty of long responses, [N] float32, at least 0.

        overlong_factor * clip((length - (max_new_tokens - overlong_buffer)) / overlong_buffer, 0, 1)

    Source: DAPO (arXiv:2503.14476), equation 13.

    Args:
        config: `overlong_buffer` > 0.
        lengths_N: tokens of each response, [N].
    """
    start = config.sampling.max_new_tokens - config.overlong_buffer
    return config.overlong_factor * ((lengths_N - start) / config.overlong_buffer).clamp(0, 1)


def total_scores(
    config: PPOConfig,
    normalizers: Mapping[str, RunningScoreNormalizer],
    models: Sequence[ModelScores],
    source_total_N: Tensor | None,
    truncated_N: Tensor,
    dropped_N: Tensor | None = None,
    lengths_N: Tensor | None = None,
) -> Scores:
    """Return the total score of every response.

        total = sum over reward models of weight * normalised score + source total - missing_eos_penalty * truncated
                - overlong penalty

    Args:
        config: `missing_eos_penalty` and the keys of the overlong penalty are read.
        normalizers: by reward model.
        models: raw scores, [N] each.
        source_total_N: weighted sum over functions and HTTP scorers, or None.
        truncated_N: [N], bool or 0/1.
        dropped_N: [N] bool, the responses whose total is 0.
        lengths_N: [N], tokens of each response, for the overlong penalty; None: there is none.
    """
    total_N = torch.zeros(truncated_N.shape[0])
    for model in models:
        total_N = total_N + model.weight * normalizers[model.name].apply(model.score_N)
    if source_total_N is not None:
        total_N = total_N + source_total_N
    total_N = total_N - config.missing_eos_penalty * truncated_N
    overlong_N = None
    if config.overlong_buffer and lengths_N is not None:
        overlong_N = overlong_penalty(config, lengths_N)
        total_N = total_N - overlong_N
    total_N = total_N if dropped_N is None else total_N.masked_fill(dropped_N, 0.0)
    return Scores(total_N, models, source_total_N, overlong_N)
