"""Load users' reward functions, call them, and check what they return.

`score` alone reads a function's results, in a worker process as in this process.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from icegrt.errors import ConfigError, RewardError
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure
from icegrt.utils.redaction import redact_text
from icegrt.utils.values import FLOAT32_MAX

_USER_MODULE = "icegrt_user_"
RewardFunction = Callable[[list[Sample]], Sequence[float | RewardResult]]


class CallError(Exception):
    """A call that returned no scores. `kind`: "raised", "returned", "timeout", "died" or "cancelled"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message

    def __reduce__(self):
        return CallError, (self.kind, self.message)


def load_reward_function(spec: str, key: str = "ppo.reward_function") -> RewardFunction:
    """Import `path/to/file.py:function` or `package.module:function`.

    Raises:
        ConfigError: the module cannot be imported or has no such function; it names `key`.
    """
    module_name, separator, name = spec.rpartition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"{key}: expected `file.py:function` or `module:function`, got {spec!r}")
    try:
        if module_name.endswith(".py"):
            module = _import_file(Path(module_name), key)
        else:
            module = importlib.import_module(module_name)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        line = "" if isinstance(error, SyntaxError) else _line_of(error, module_name)
        raise ConfigError(
            f"{key}: importing {module_name} failed: {type(error).__name__}: {redact_text(str(error))}{line}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}: {module_name} has no function `{name}`")
    return function


def _import_file(path: Path, key: str):
    if not path.is_file():
        raise ConfigError(f"{key}: no file {path}")
    _check_helpers(path, key)
    name = f"{_USER_MODULE}{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and Path(loaded.__file__).resolve() != path.resolve():
        name += f"_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles of the module look it up in sys.modules. Its own imports need its folder in sys.path.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if sys.path[:1] != [folder]:  # also if it stands further back: its own helpers come first
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module


def _check_helpers(path: Path, key: str) -> None:
    """Check that no other module of this process has the name of a helper beside `path`.

    Python keeps one module of a name, so that `path` would silently run with the helper of another file.
    """
    own = _helpers(path)
    others = {name: module for name, module in sys.modules.items() if name in own}
    user_files = [module.__file__ for name, module in sys.modules.items() if name.startswith(_USER_MODULE)]
    loaded = {name: file for name, module in others.items() if (file := getattr(module, "__file__", None))}
    for file in user_files:  # a helper that a function imports when it is called may not be loaded yet
        loaded = {name: str(helper) for name, helper in _helpers(Path(file)).items()} | loaded
    for name, helper in own.items():
        if name in loaded and Path(loaded[name]).resolve() != helper:
            raise ConfigError(
                f"{key}: {path} imports `{name}`, {helper}, but this process has another `{name}`, {loaded[name]}; "
                "rename one of them, or set ppo.reward.workers=1, which gives each function its own process"
            )


def _helpers(path: Path) -> dict[str, Path]:
    """Return the modules beside `path` that it imports, directly or through one another."""
    folder, helpers, pending = path.resolve().parent, {}, [path]
    while pending:
        try:
            tree = ast.parse(pending.pop().read_bytes())
        except (OSError, SyntaxError, ValueError):  # the import reports it
            continue
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for name in {module.partition(".")[0] for module in modules} - {*helpers, *sys.stdlib_module_names}:
                candidates = (folder / f"{name}.py", folder / name / "__init__.py")
                file = next((candidate for candidate in candidates if candidate.is_file()), None)
                if file is not None:
                    helpers[name] = file
                    pending.append(file)
    return helpers


def name_of(function: Any) -> str:
    """Return a function's name for messages and metrics."""
    return getattr(function, "__name__", type(function).__name__)


def score(function: RewardFunction, samples: list[Sample]) -> list[ScoreOrFailure]:
    """Call `function` and return a result per sample, with a `ScoringFailure` for a score that is not finite.

    Raises:
        CallError: the function raised, or returned no list with one entry per sample.
    """
    # 1. call it
    name = name_of(function)
    try:
        returned = function(samples)
        if inspect.isawaitable(returned):
            returned = run_async(returned)
        is_list = isinstance(returned, Iterable) and not isinstance(returned, (str, bytes, Mapping))
        results = list(returned) if is_list else None
    except RewardError as error:  # an adapter raises it with a complete message
        raise CallError("raised", str(error)) from error
    except (Exception, SystemExit) as error:
        line = _line_of(error, _file_of(function))
        text = redact_text(f"{type(error).__name__}: {_clipped(' '.join(str(error).split()), 300)}".removesuffix(": "))
        raise CallError("raised", f"reward function `{name}` raised {text}{line}") from error
    # 2. check the list
    batch = f"for {len(samples)} samples, the first of which is {samples[0].where}"
    if results is None:
        raise CallError(
            "returned",
            f"reward function `{name}` returned {_short(returned)} {batch}; expected a list with one number for each",
        )
    if len(results) != len(samples):
        raise CallError(
            "returned", f"reward function `{name}` returned {len(results)} scores {batch}; expected one for each"
        )
    # 3. check each result
    return [checked_result(f"reward function `{name}`", r, s) for r, s in zip(results, samples, strict=True)]


def checked_result(source: str, value: Any, sample: Sample) -> ScoreOrFailure:
    """Return the result of `source` for one sample as plain floats, or a `ScoringFailure` that names its fault."""
    result = value if isinstance(value, RewardResult) else RewardResult(value)
    answer = f"The answer was: {sample.text[:80]!r}"
    # 1. the score; None is valid in a RewardResult only
    if not (result.score is None and result is value) and not is_finite_number(result.score):
        return ScoringFailure(
            f"{source} returned {_short(result.score)} for {sample.where}; expected a finite number. {answer}"
        )
    # 2. the metrics
    metrics = result.metrics if isinstance(result.metrics, Mapping) else {"metrics": result.metrics}
    for name, number in metrics.items():
        if not isinstance(name, str) or not is_finite_number(number, boolean=True):
            return ScoringFailure(
                f"{source} returned the metric {name!r} as {_short(number)} for {sample.where}; expected a finite "
                "number under a text"
            )
    # 3. the rewards of tokens
    rewards_A = result.token_rewards_A
    if rewards_A is not None:
        rewards_A = rewards_A.tolist() if hasattr(rewards_A, "tolist") else rewards_A
        rewards_A = list(rewards_A) if isinstance(rewards_A, Iterable) else [rewards_A]
        if len(rewards_A) != len(sample.tokens):
            return ScoringFailure(
                f"{source} returned {len(rewards_A)} token_rewards_A for {sample.where}; expected one for each of the "
                f"answer's {len(sample.tokens)} tokens. {answer}"
            )
        invalid = next((i for i, x in enumerate(rewards_A) if not is_finite_number(x)), None)
        if invalid is not None:
            return ScoringFailure(
                f"{source} returned {_short(rewards_A[invalid])} as token_rewards_A[{invalid}] for {sample.where}; "
                f"expected a finite number. {answer}"
            )
        rewards_A = [float(x) for x in rewards_A]
    score = None if result.score is None else float(result.score)
    return RewardResult(score, {name: float(number) for name, number in metrics.items()}, rewards_A)


def is_finite_number(value: Any, *, boolean: bool = False) -> bool:
    """Return whether a value of Python, numpy or torch is a finite float32 number.

    A boolean is none unless `boolean`: a function with `return x == y` is probably a mistake.
    """
    # numpy and torch have boolean types of their own, which are no subclasses of bool.
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith(("bool", "bool_"))
    if isinstance(value, (str, bytes)) or (is_bool and not boolean):
        return False
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return math.isfinite(number) and abs(number) <= FLOAT32_MAX  # scores become float32


def run_async(awaitable: Any) -> Any:
    """Return the result of an awaitable. Works inside a running event loop, such as a notebook's, too."""

    async def finish() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finish())
    # asyncio allows one running loop per thread: run a second one in a new thread.
    return start_daemon("reward async", asyncio.run, finish()).result()


def start_daemon(name: str, call: Callable[..., Any], *args: Any) -> Future:
    """Start `call(*args)` in a daemon thread and return its future.

    A daemon, unlike the threads of an executor, does not keep the process from exiting if the call never returns.
    """
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # the caller handles it, KeyboardInterrupt included
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _file_of(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_filename if code is not None else ""


def _line_of(error: BaseException, file: str) -> str:
    """Return ` in FILE:LINE` for the innermost frame of the user's file in the traceback; empty without one."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [f for f in frames if file and Path(f.filename).name == Path(file).name and f.lineno]
    return f" in {Path(user_frames[-1].filename).name}:{user_frames[-1].lineno}" if user_frames else ""


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # for example an integer of over 4300 digits
        text = f"a {type(value).__name__}"
    return redact_text(_clipped(text, 80))


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
