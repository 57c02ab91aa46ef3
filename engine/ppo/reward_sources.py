"""The reward composition of a PPO run: reward models, functions and HTTP scorers, each with a weight."""

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
from icegrt.utils.values import is_number

# A reward model, the URL of an HTTP scorer, `file.py:function`, or a function: icegrt's, TRL's, verl's or OpenRLHF's.
RewardLike = ModelSource | RewardFunction | Callable[..., Any]
WeightedReward = tuple[RewardLike, float]
RewardArgument = RewardLike | WeightedReward | Sequence[RewardLike | WeightedReward]


@dataclass(frozen=True)
class RewardComposition:
    """The reward models by the name of their role, and the other sources: functions and HTTP scorers."""

    models: dict[str, RewardSpec]
    sources: RewardSourceGroup

    @classmethod
    def of(cls, config: PPOConfig, reward: RewardArgument | None) -> RewardComposition:
        """Return the composition of a run; nothing is loaded.

        Args:
            config: names the sources if `reward` is None.
            reward: a path, model, callable or URL, alone or as (source, weight), or a list of these.

        Raises:
            ConfigError: there is no source, or a weight is not a finite number.
        """
        if reward is None:
            specs = _specs_of_config(config)
        else:
            specs = _specs_of(config, reward if isinstance(reward, list) else [reward])
        if not specs:
            raise ConfigError(
                "no reward: set ppo.reward_model, ppo.reward_function, or both (or name others in ppo.reward.sources)"
            )
        specs = named(specs)
        models = [spec for spec in specs if spec.model is not None]
        sources = [spec for spec in specs if spec.model is None]
        roles = [f"reward:{spec.name}" if i else "reward" for i, spec in enumerate(models)]
        return cls(dict(zip(roles, models, strict=True)), RewardSourceGroup.of(sources, config.reward, config.run.seed))


def _specs_of_config(config: PPOConfig) -> list[RewardSpec]:
    specs = []
    if config.reward_model:
        key, weight = "ppo.reward_model", config.reward_model_weight
        specs.append(RewardSpec(model=config.reward_model, weight=weight, key=key))
    if config.reward_function:
        key, weight = "ppo.reward_function", config.reward_function_weight
        specs.append(RewardSpec(function=config.reward_function, weight=weight, key=key))
    sources = enumerate(config.reward.sources)
    return specs + [RewardSpec.of(source, f"ppo.reward.sources[{i}]") for i, source in sources]


def _specs_of(config: PPOConfig, rewards: list[Any]) -> list[RewardSpec]:
    specs = []
    # The first model and the first function without a weight get the configured one.
    default_weights = {"model": config.reward_model_weight, "function": config.reward_function_weight}
    for reward in rewards:
        source, weight = reward if isinstance(reward, tuple) and len(reward) == 2 else (reward, None)
        if weight is not None and not (is_number(weight) and math.isfinite(weight)):
            what = type(weight).__name__ if not isinstance(weight, (int, float)) else weight
            raise ConfigError(
                f"reward: expected a source, or (source, weight) with a finite number; got {what} as weight"
            )
        is_url = isinstance(source, str) and source.startswith(("http://", "https://"))
        kind = "url" if is_url else "function" if _is_function(source) else "model"
        specs.append(RewardSpec(**{kind: source}, weight=default_weights.pop(kind, 1.0) if weight is None else weight))
    return specs


def _is_function(source: Any) -> bool:
    if isinstance(source, str):
        return ".py:" in source or (":" in source and not Path(source).exists())
    return isinstance(source, Callable) and not hasattr(source, "state_dict")
