"""Rotary position embeddings with the checkpoint's own parameters.

Megatron 0.16: the parameters of Llama 3's scaling are constants (8192, 1, 4) -> frequencies are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from icegrt.errors import CheckpointError

_THETA = 10_000.0  # the default of transformers in every supported family
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_KEYS = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}


@dataclass(frozen=True)
class Rope:
    """Base and scaling of rotary position embeddings. Parameters that `kind` does not use are 1.

    Attributes:
        theta: base of the frequencies.
        kind: type of scaling.
        factor: divides frequencies ('linear' and 'llama3').
        low_freq_factor: wavelengths that fit fewer times into the original context are scaled ('llama3').
        high_freq_factor: wavelengths that fit more often into the original context are not scaled ('llama3').
        original_max_position_embeddings: original context, in tokens ('llama3').
    """

    theta: float = _THETA
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Rope:
        """Read `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (earlier versions).

        Args:
            config: a Hugging Face configuration.
            where: its name in error messages.

        Raises:
            CheckpointError: unsupported type of rope, a missing or unknown parameter, or a value that is not a number.
        """
        name, parameters = _section(config, where)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in _KEYS:
            raise CheckpointError(
                f"{where}: `{name}` asks for rope type {kind!r}, which is not supported; supported: "
                + ", ".join(map(repr, _KEYS))
            )
        top_level = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        values = {key: config[key] for key in top_level if config.get(key) is not None}
        values |= {key: value for key, value in parameters.items() if value is not None}
        unknown = sorted(parameters.keys() - {"rope_type", "type", *top_level, *_KEYS[kind]})
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
        """Return the frequency of each pair of dimensions, in radians per position, [head_dim / 2] float32.

            frequency_i = theta ** (-2 i / head_dim)

        'linear' divides all frequencies by `factor`. 'llama3' divides those whose wavelength fits less than
        `low_freq_factor` times into the original context, keeps those that fit `high_freq_factor` times, and
        interpolates between them (model card of Llama 3.1; same arithmetic as `transformers`).
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        plain = 1.0 / self.theta**exponents
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        repetitions = self.original_max_position_embeddings * plain / (2 * math.pi)
        blend = (repetitions - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * plain / self.factor + blend * plain


def _section(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    sections = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}
    if len(sections) == 2 and sections["rope_parameters"] != sections["rope_scaling"]:
        raise CheckpointError(f"{where}: `rope_parameters` and `rope_scaling` disagree; keep the one that is right")
    name, parameters = next(iter(sections.items()), ("rope_parameters", {}))
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"{where}: `{name}` must be an object, got {parameters!r}")
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(f"{where}: `{name}.{nested[0]}`: different rope for different layers is not supported")
    return name, parameters


def _positive(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: `{key}` must be a number above 0, got {value!r}")
    return float(value)
