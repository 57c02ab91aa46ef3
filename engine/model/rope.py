"""Rotary position embeddings from the checkpoint's own parameters.

Megatron-core has the figures of Llama 3's scaling built in (8192, 1, 4), so the table is made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from icegrt.errors import CheckpointError

_THETA = 10_000.0  # what transformers assumes in every family here where a configuration names none
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KEYS = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}


@dataclass(frozen=True)
class Rope:
    """Base and scaling. `factor` and the three figures after it are 1 where `kind` has no use for them."""

    theta: float = _THETA
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).

        Raises `CheckpointError` for another type of rope, a missing or unknown parameter, or one that is no number.
        """
        name, given = _section(config, where)
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _KEYS:
            raise CheckpointError(
                f"{where}: `{name}` asks for rope type {kind!r}, which is not supported; supported: "
                + ", ".join(map(repr, _KEYS))
            )
        outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        values = {key: config[key] for key in outside if config.get(key) is not None}
        values |= {key: value for key, value in given.items() if value is not None}
        unknown = sorted(given.keys() - {"rope_type", "type", *outside, *_KEYS[kind]})
        if unknown:
            raise CheckpointError(f"{where}: `{name}.{unknown[0]}` is not a parameter of rope type {kind!r}")
        if values.get("partial_rotary_factor", 1) != 1:
            raise CheckpointError(f"{where}: `partial_rotary_factor` is not 1; only whole heads are rotated here")
        numbers = {key: _positive(values, key, f"{where}: `{name}`") for key in _KEYS[kind]}
        theta = _positive({"rope_theta": _THETA} | values, "rope_theta", f"{where}: `{name}`")
        rope = cls(theta, kind, **numbers)
        if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
            raise CheckpointError(f"{where}: `{name}.high_freq_factor` must be above `low_freq_factor`")
        return rope

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """Radians per position of each pair of a head's dimensions, [head_dim / 2] float32.

        Llama 3's scaling leaves wavelengths alone that fit `high_freq_factor` times into the original context, divides
        those by `factor` that fit less than `low_freq_factor` times, and blends in between (the model card of Llama
        3.1, as `transformers` computes it).
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        plain = 1.0 / self.theta**exponents
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        fits = self.original_max_position_embeddings * plain / (2 * math.pi)
        blend = (fits - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * plain / self.factor + blend * plain


def _section(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    found = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise CheckpointError(f"{where}: `rope_parameters` and `rope_scaling` disagree; keep the one that is right")
    name, given = next(iter(found.items()), ("rope_parameters", {}))
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: `{name}` must be an object, got {given!r}")
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(f"{where}: `{name}.{nested[0]}`: different rope for different layers is not supported")
    return name, given


def _positive(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: `{key}` must be a number above 0, got {value!r}")
    return float(value)
