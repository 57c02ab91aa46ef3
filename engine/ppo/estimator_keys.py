"""Check the keys of the configuration against the estimator of the advantages, and name those without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.ppo.policy_rows import keys_that_need_all_rows
from icegrt.utils.console import warn


def check_estimator(config: PPOConfig) -> None:
    """Raise `ConfigError` for keys that contradict `advantage`, and warn of those that it or the loss does not read."""
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
    unread_by = {f"advantage={name}": [*_keys_without_effect(config)], **_keys_of_other_losses(config)}
    for setting, unread in unread_by.items():
        if unread:
            warn(f"ppo.{setting} does not read {', '.join(unread)}: what is set there has no effect")
    if config.skip_zero_advantage is True and (needed_by := keys_that_need_all_rows(config, config.kl_coef)):
        warn(
            f"ppo.skip_zero_advantage=true has no effect because of {' and '.join(needed_by)}: the loss needs the "
            "responses without advantage, too"
        )


def _check_lambdas(config: PPOConfig) -> None:
    lam = config.lam_policy
    if isinstance(lam, float) and not 0 <= lam <= 1:
        raise ConfigError(f"ppo.lam_policy is {lam}; expected a number from 0 to 1, adaptive, or null for ppo.lam")
    if lam == "adaptive" and config.advantage_unit == "turn" and config.has_critic:
        raise ConfigError(
            "ppo.lam_policy=adaptive counts the tokens of a response, but with ppo.advantage_unit=turn the recursion "
            "has one step per turn. Set ppo.lam_policy to a number, or ppo.advantage_unit=token"
        )
    longest = config.sampling.max_new_tokens
    if lam == "adaptive" and config.has_critic and config.lam_alpha * longest <= 1:
        warn(
            f"ppo.lam_policy=adaptive is 0 for every response: with ppo.lam_alpha={config.lam_alpha:g} for those of up "
            f"to {1 / config.lam_alpha:.4g} tokens, and ppo.sampling.max_new_tokens is {longest}. Raise ppo.lam_alpha, "
            "or set ppo.lam_policy to a number"
        )


def _keys_without_effect(config: PPOConfig) -> Iterator[str]:
    """Yield the keys that differ from their default and that nothing reads with this estimator."""
    names = []
    if not config.has_critic:
        yield from (f"ppo.critic.{key}" for key in _changed(config.critic, PPOConfig().critic))
        names += ["lam", "lam_policy", "lam_alpha", "lam_value", "advantage_unit", "value_clip", "offload.critic"]
        names += ["reuse_update_values"]
    else:
        names += [] if config.lam_policy == "adaptive" else ["lam_alpha"]
        names += [] if config.lam_policy is None or config.lam_value is None else ["lam"]
    if config.advantage in ("rloo", "grpo"):
        names.append("gamma")
    if config.advantage != "grpo":
        names.append("group_std")
    yield from _that_differ(config, names)


def _keys_of_other_losses(config: PPOConfig) -> dict[str, list[str]]:
    """Return the keys that differ from their default and that the policy loss does not read, by the setting."""
    unread = {
        "none": ["correction_level", "tis_cap", "dis_low", "dis_high"],
        "tis": ["dis_low", "dis_high"],
        "dis": ["tis_cap"],
    }
    names = {f"correction={config.correction}": unread[config.correction]}
    if config.loss_aggregation != "constant":
        names[f"loss_aggregation={config.loss_aggregation}"] = ["loss_constant"]
    if not config.overlong_buffer:
        names["overlong_buffer=0"] = ["overlong_factor"]
    return {setting: _that_differ(config, keys) for setting, keys in names.items()}


def _that_differ(config: PPOConfig, names: Sequence[str]) -> list[str]:
    """Return those of the keys that differ from their default."""
    default = PPOConfig()
    return [f"ppo.{name}" for name in names if _read(config, name) != _read(default, name)]


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
