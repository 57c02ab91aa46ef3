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
    if config.bootstrap_truncated and not config.has_critic:
        raise ConfigError(
            f"ppo.bootstrap_truncated needs the value of a critic, and ppo.advantage={name} has none. Set it to false, "
            "or ppo.advantage=gae"
        )
    if unread := [*_keys_without_effect(config)]:
        warn(f"ppo.advantage={name} does not read {', '.join(unread)}: what is set there has no effect")


def _keys_without_effect(config: PPOConfig) -> Iterator[str]:
    """Yield the keys that differ from their default and that nothing reads with this estimator."""
    default = PPOConfig()
    names = []
    if not config.has_critic:
        yield from (f"ppo.critic.{key}" for key in _changed(config.critic, default.critic))
        names += ["lam", "value_clip", "offload.critic"]
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
