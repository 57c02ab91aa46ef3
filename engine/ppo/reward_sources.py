"""Where a PPO run's scores come from: what the configuration or Python names, sorted into models and what is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.model.hf.reader import ModelSource
from icegrt.rewards.function import RewardFunction
from icegrt.rewards.sources import RewardSourceGroup, RewardSpec, named

# A reward model, the URL of an HTTP scorer, `file.py:function`, or a function: icegrt's, TRL's, verl's or OpenRLHF's.
RewardLike = ModelSource | RewardFunction | Callable[..., Any]
WeightedReward = tuple[RewardLike, float]
RewardArgument = RewardLike | WeightedReward | Sequence[RewardLike | WeightedReward]


@dataclass(frozen=True)
class RewardComposition:
    """The reward models by the name of their role, and all other sources: functions and HTTP scorers."""

    models: dict[str, RewardSpec]
    sources: RewardSourceGroup

    @classmethod
    def of(cls, config: PPOConfig, given: RewardArgument | None) -> RewardComposition:
        """`given` (a path, model, callable or URL, each alone or with a weight, or a list of them), or else what the
        configuration names. Nothing is loaded yet."""
        if given is None:
            entries = _configured(config)
        else:
            entries = _given(config, list(given) if isinstance(given, list) else [given])
        if not entries:
            raise ConfigError(
                "no reward: set ppo.reward_model, ppo.reward_function, or both (or name others in ppo.reward.sources)"
            )
        entries = named(entries)
        models = [entry for entry in entries if entry.model is not None]
        called = [entry for entry in entries if entry.model is None]
        roles = [f"reward:{entry.name}" if i else "reward" for i, entry in enumerate(models)]
        return cls(dict(zip(roles, models, strict=True)), RewardSourceGroup.of(called, config.reward, config.run.seed))


def _configured(config: PPOConfig) -> list[RewardSpec]:
    entries = []
    if config.reward_model:
        key, weight = "ppo.reward_model", config.reward_model_weight
        entries.append(RewardSpec(model=config.reward_model, weight=weight, key=key))
    if config.reward_function:
        key, weight = "ppo.reward_function", config.reward_function_weight
        entries.append(RewardSpec(function=config.reward_function, weight=weight, key=key))
    sources = enumerate(config.reward.sources)
    return entries + [RewardSpec.of(source, f"ppo.reward.sources[{i}]") for i, source in sources]


def _given(config: PPOConfig, parts: list[Any]) -> list[RewardSpec]:
    entries = []
    # What the first of its kind weighs that is given without a weight.
    plain = {"model": config.reward_model_weight, "function": config.reward_function_weight}
    for part in parts:
        part, weight = part if isinstance(part, tuple) and len(part) == 2 else (part, None)
        if weight is not None and not _is_finite(weight):
            what = type(weight).__name__ if not isinstance(weight, (int, float)) else weight
            raise ConfigError(
                f"reward: expected a source, or (source, weight) with a finite number; got {what} as weight"
            )
        is_url = isinstance(part, str) and part.startswith(("http://", "https://"))
        kind = "url" if is_url else "function" if _is_function(part) else "model"
        entries.append(RewardSpec(**{kind: part}, weight=plain.pop(kind, 1.0) if weight is None else weight))
    return entries


def _is_finite(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)


def _is_function(part: Any) -> bool:
    if isinstance(part, str):
        return ".py:" in part or (":" in part and not Path(part).exists())
    return isinstance(part, Callable) and not hasattr(part, "state_dict")
