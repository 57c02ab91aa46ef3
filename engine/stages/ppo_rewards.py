"""Where a PPO run's scores come from: what the configuration or Python names, sorted into models and what is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.config import PPOConfig
from icegrt.errors import CheckpointError, ConfigError
from icegrt.model.architecture import read_object
from icegrt.rewards.sources import Entry, Scorers
from icegrt.stages.reward import SCORE_STATISTICS


@dataclass(frozen=True)
class RewardSources:
    """Where scores come from: a reward model (a checkpoint or a model in memory), and functions and HTTP scorers."""

    model: Any
    scorers: Scorers

    @classmethod
    def of(cls, config: PPOConfig, given: Any) -> RewardSources:
        """`given` (a path, model, callable or URL, each alone or with a weight, or a list of them), or else what the
        configuration names. Nothing is loaded yet."""
        if given is None:
            model, entries = config.reward_model or None, _configured(config)
        else:
            model, entries = _given(config, list(given) if isinstance(given, list) else [given])
        if model is None and not entries:
            raise ConfigError(
                "no reward: set ppo.reward_model, ppo.reward_function, or both (or name others in ppo.reward.sources)"
            )
        return cls(model, Scorers.of(entries, config.reward, config.run.seed))


def _configured(config: PPOConfig) -> list[Entry]:
    entries = []
    if config.reward_function:
        key, weight = "ppo.reward_function", config.reward_function_weight
        entries.append(Entry(function=config.reward_function, weight=weight, key=key))
    sources = enumerate(config.reward.sources)
    return entries + [Entry.of(source, f"ppo.reward.sources[{i}]") for i, source in sources]


def _given(config: PPOConfig, parts: list[Any]) -> tuple[Any, list[Entry]]:
    models, entries = [], []
    for part in parts:
        part, weight = part if isinstance(part, tuple) and len(part) == 2 else (part, None)
        if isinstance(part, str) and part.startswith(("http://", "https://")):
            entries.append(Entry(url=part, weight=1.0 if weight is None else weight))
        elif _is_function(part):
            first = not any(entry.function is not None for entry in entries)
            default = config.reward_function_weight if first else 1.0
            entries.append(Entry(function=part, weight=default if weight is None else weight))
        elif weight is not None:
            raise ConfigError("a reward model's weight is ppo.reward_model_weight; pass the model alone")
        else:
            models.append(part)
    if len(models) > 1:
        raise ConfigError(
            f"{len(models)} reward models were given; expected at most one: call the others in a reward function, or "
            "serve them behind HTTP and give the URL (docs/rewards.md)"
        )
    return models[0] if models else None, entries


def _is_function(part: Any) -> bool:
    if isinstance(part, str):
        return ".py:" in part or (":" in part and not Path(part).exists())
    return isinstance(part, Callable) and not hasattr(part, "state_dict")


def saved_statistics(reward_model: Any) -> dict[str, float] | None:
    """Count, mean and std of the scores that a reward model's checkpoint says it gives; None where it does not say."""
    path = Path(reward_model) / SCORE_STATISTICS if isinstance(reward_model, (str, Path)) else None
    if path is None or not path.is_file():
        return None
    found = read_object(path).get("after")
    if not isinstance(found, dict) or not all(isinstance(found.get(k), (int, float)) for k in ("count", "mean", "std")):
        raise CheckpointError(
            f"{path}: expected `after` with count, mean and std; remove the file to start without them"
        )
    return found
