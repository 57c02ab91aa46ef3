"""Reward functions written by users: found, called, and held to their word."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.errors import ConfigError, RewardError


@dataclass(frozen=True)
class Sample:
    """What a reward function sees of one response.

    text: the answer without special tokens. tokens: as sampled, EOS included. finish_reason: 'stop' or 'length'.
    row: all columns of the prompt's data row. group: responses to one prompt share it.
    """

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str
    row: dict[str, Any]
    where: str
    group: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation: the prompt's messages (a plain prompt is one user message), then the answer."""
        prompt = self.row.get("messages") or self.row.get("prompt")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        if turns and turns[-1].get("role") == "assistant":
            turns = turns[:-1]
        return [*turns, {"role": "assistant", "content": self.text}]


RewardFunction = Callable[[list[Sample]], Sequence[float]]


def load_reward_function(spec: str, key: str = "ppo.reward_function") -> RewardFunction:
    """Import `path/to/file.py:function` or `package.module:function`. Raises `ConfigError` naming `key`."""
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise ConfigError(f"{key}: expected `file.py:function` or `module:function`, got {spec!r}")
    try:
        module = _import_file(Path(place), key) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}: importing {place} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}: {place} has no function `{name}`")
    return function


def _import_file(path: Path, key: str):
    if not path.is_file():
        raise ConfigError(f"{key}: no file {path}")
    name = f"icegrt_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Registered, so that dataclasses and pickles of the user's module work; its folder too, for its own imports.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module


def call_reward_function(function: RewardFunction, samples: list[Sample]) -> list[float]:
    """Score all samples. Raises `RewardError` if it raises, or returns anything but one finite number per sample."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        returned = function(samples)
        scores = list(returned) if isinstance(returned, Iterable) and not isinstance(returned, (str, Mapping)) else None
    except Exception as error:
        place = _row_at_fault(function, samples)
        raise RewardError(f"reward function `{name}` raised {type(error).__name__}: {error}{place}") from error
    if scores is None:
        raise RewardError(
            f"reward function `{name}` returned {_short(returned)} for {len(samples)} samples, the first of which is "
            f"{samples[0].where}; expected a list with one number for each"
        )
    if len(scores) != len(samples):
        raise RewardError(
            f"reward function `{name}` returned {len(scores)} scores for {len(samples)} samples, the first of which is "
            f"{samples[0].where}; expected one for each"
        )
    for sample, score in zip(samples, scores, strict=True):
        if not _is_finite_number(score):
            raise RewardError(
                f"reward function `{name}` returned {_short(score)} for {sample.where}; expected a finite number. "
                f"The answer was: {sample.text[:80]!r}"
            )
    return [float(score) for score in scores]


def _is_finite_number(score: Any) -> bool:
    # numpy and torch have booleans of their own.
    if isinstance(score, (bool, str)) or str(getattr(score, "dtype", "")).endswith(("bool", "bool_")):
        return False
    try:
        return math.isfinite(float(score))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _row_at_fault(function: RewardFunction, samples: list[Sample]) -> str:
    # Called again one by one: a crash over a batch is no help without the row that caused it.
    for sample in samples:
        try:
            list(function([sample]))  # a generator runs only when it is read
        except Exception:
            return f" (at {sample.where}, answer {sample.text[:80]!r})"
    return " (on the whole batch, on no single row)"
