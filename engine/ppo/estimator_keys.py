"""Check the keys of the configuration against the estimator of the advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.utils.console import warn


def check_estimator(config: PPOConfig) -> None:
    """Raise `ConfigError` for keys that contradict `advantage`, and warn of those that it does not read."""
    name = config.advantage
    if name in ("rloo", "grpo") and config.samples_per_prompt < 2:
        raise ConfigError(
            f"ppo.advantage={name} compares the responses to a prompt, but ppo.samples_per_prompt is "
            f"{config.samples_per_prompt}: every advantage would be 0. Set it to 2 or more, or ppo.advantage=gae or "
            "reinforce++"
        )
    if config.dynamic_sampling and config.samples_per_prompt < 2:
        raise ConfigError(
            f"ppo.dynamic_sampling compares the responses to a prompt, but ppo.samples_per_prompt is "
            f"{config.samples_per_prompt}: every prompt would be left out. Set it to 2 or more, or "
            "ppo.dynamic_sampling=false"
        )
    if config.bootstrap_truncated and not config.has_critic:
        raise ConfigError(
            f"ppo.bootstrap_truncated needs the value of a critic, and ppo.advantage={name} has none. Set it to false, "
            "or ppo.advantage=gae"
        )
    _check_lambdas(config)
    if unread := [*_keys_without_effect(config)]:
        warn(f"ppo.advantage={name} does not read {', '.join(unread)}: what is set there has no effect")


def _check_lambdas(config: PPOConfig) -> None:
    lam = config.lam_policy
    if isinstance(lam, float) and not 0 <= lam <= 1:
        raise ConfigError(f"ppo.lam_policy is {lam}; expected a number from 0 to 1, adaptive, or null for ppo.lam")
    if lam == "adaptive" and config.advantage_unit == "turn" and config.has_critic:
        raise ConfigError(
            "ppo.lam_policy=adaptive counts the tokens of a response, but with ppo.advantage_unit=turn the recursion "
            "has one step per turn. Set ppo.lam_policy to a number, or ppo.advantage_unit=token"
        )


def _keys_without_effect(config: PPOConfig) -> Iterator[str]:
    """Yield the keys that differ from their default and that nothing reads with this estimator."""
    default = PPOConfig()
    names = []
    if not config.has_critic:
        yield from (f"ppo.critic.{key}" for key in _changed(config.critic, default.critic))
        names += ["lam", "lam_policy", "lam_alpha", "lam_value", "advantage_unit", "value_clip", "offload.critic"]
        names += ["reuse_update_values"]
    else:
        names += [] if config.lam_policy == "adaptive" else ["lam_alpha"]
        names += [] if config.lam_policy is None or config.lam_value is None else ["lam"]
    if config.advantage in ("rloo", "grpo"):
        names.append("gamma")
    if config.advantage != "grpo":
        names.append("group_std")
    yield from (f"ppo.{name}" for name in names if _read(config, name) != _read(default, name))


def _changed(section: Any, default: Any) -> Iterator[str]:
    for field in dataclasses.fields(section):
        own, other = getattr(section, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(own):
            yield from (f"{field.name}.{key}" for key in _changed(own, other))
        elif own != other:
            yield field.name


def _read(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
