"""Reward functions written by users: found, called, and held to their word.

`score` is the one place that reads what a function returns, in a worker process as in this one.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.errors import ConfigError, RewardError
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure
from icegrt.utils.redaction import redact_text

RewardFunction = Callable[[list[Sample]], Sequence[float | RewardResult]]
# Scores are float32 from here on.
_LARGEST = 3.4028234663852886e38


class CallError(Exception):
    """A call that gave no scores at all. `kind`: raised, returned, timeout or died; `__cause__` where it is known."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message

    def __reduce__(self):
        return CallError, (self.kind, self.message)


def load_reward_function(spec: str, key: str = "ppo.reward_function") -> RewardFunction:
    """Import `path/to/file.py:function` or `package.module:function`. Raises `ConfigError` naming `key`."""
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise ConfigError(f"{key}: expected `file.py:function` or `module:function`, got {spec!r}")
    try:
        module = _import_file(Path(place), key) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        at = "" if isinstance(error, SyntaxError) else _line_of(error, place)
        raise ConfigError(
            f"{key}: importing {place} failed: {type(error).__name__}: {redact_text(str(error))}{at}"
        ) from error
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


def name_of(function: Any) -> str:
    """What a function is called in messages and metrics."""
    return getattr(function, "__name__", type(function).__name__)


def score(function: RewardFunction, samples: list[Sample]) -> list[ScoreOrFailure]:
    """Return a result per sample, a `ScoringFailure` for a score that is not finite. Raises `CallError` without any."""
    name = name_of(function)
    try:
        returned = function(samples)
        if inspect.isawaitable(returned):
            returned = run_async(returned)
        is_list = isinstance(returned, Iterable) and not isinstance(returned, (str, bytes, Mapping))
        results = list(returned) if is_list else None
    except RewardError as error:  # an adapter's, in words already
        raise CallError("raised", str(error)) from error
    except (Exception, SystemExit) as error:
        at = _line_of(error, _file_of(function))
        what = redact_text(f"{type(error).__name__}: {_clipped(' '.join(str(error).split()), 300)}".removesuffix(": "))
        raise CallError("raised", f"reward function `{name}` raised {what}{at}") from error
    first = f"for {len(samples)} samples, the first of which is {samples[0].where}"
    if results is None:
        raise CallError(
            "returned",
            f"reward function `{name}` returned {_short(returned)} {first}; expected a list with one number for each",
        )
    if len(results) != len(samples):
        raise CallError(
            "returned", f"reward function `{name}` returned {len(results)} scores {first}; expected one for each"
        )
    return [result_of(f"reward function `{name}`", r, sample) for r, sample in zip(results, samples, strict=True)]


def result_of(who: str, returned: Any, sample: Sample) -> ScoreOrFailure:
    """What `who` returned for one sample, as plain floats."""
    result = returned if isinstance(returned, RewardResult) else RewardResult(returned)
    answer = f"The answer was: {sample.text[:80]!r}"
    if not (result.score is None and result is returned) and not is_finite_number(result.score):
        return ScoringFailure(
            f"{who} returned {_short(result.score)} for {sample.where}; expected a finite number. {answer}"
        )
    metrics = result.metrics if isinstance(result.metrics, Mapping) else {"metrics": result.metrics}
    for name, value in metrics.items():
        if not isinstance(name, str) or not is_finite_number(value, boolean=True):
            return ScoringFailure(
                f"{who} returned the metric {name!r} as {_short(value)} for {sample.where}; expected a finite number "
                "under a text"
            )
    rewards_A = result.token_rewards_A
    if rewards_A is not None:
        rewards_A = rewards_A.tolist() if hasattr(rewards_A, "tolist") else rewards_A
        rewards_A = list(rewards_A) if isinstance(rewards_A, Iterable) else [rewards_A]
        if len(rewards_A) != len(sample.tokens):
            return ScoringFailure(
                f"{who} returned {len(rewards_A)} token_rewards_A for {sample.where}; expected one for each of the "
                f"answer's {len(sample.tokens)} tokens. {answer}"
            )
        bad = next((i for i, x in enumerate(rewards_A) if not is_finite_number(x)), None)
        if bad is not None:
            return ScoringFailure(
                f"{who} returned {_short(rewards_A[bad])} as token_rewards_A[{bad}] for {sample.where}; expected a "
                f"finite number. {answer}"
            )
        rewards_A = [float(x) for x in rewards_A]
    score = None if result.score is None else float(result.score)
    return RewardResult(score, {name: float(value) for name, value in metrics.items()}, rewards_A)


def is_finite_number(score: Any, *, boolean: bool = False) -> bool:
    """Whether float32 can hold it as a number. A boolean is none unless `boolean`: `return x == y` is a likely slip."""
    # numpy and torch have booleans of their own.
    is_bool = isinstance(score, bool) or str(getattr(score, "dtype", "")).endswith(("bool", "bool_"))
    if isinstance(score, (str, bytes)) or (is_bool and not boolean):
        return False
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return math.isfinite(number) and abs(number) <= _LARGEST


def run_async(awaitable: Any) -> Any:
    """The result of an awaitable, inside a running event loop (a notebook's) too."""

    async def finish() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finish())
    box: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            box.append(asyncio.run(finish()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return box[0]


def _file_of(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_filename if code is not None else ""


def _line_of(error: BaseException, file: str) -> str:
    """` in FILE:LINE`, the innermost line of the user's own file that the exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if file and Path(f.filename).name == Path(file).name and f.lineno]
    return f" in {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return redact_text(_clipped(text, 80))


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
