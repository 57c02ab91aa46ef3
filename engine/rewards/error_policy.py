"""Handle failed calls of a reward function: raise with the row at fault, or bisect and score the rest; time limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

from icegrt.errors import RewardError
from icegrt.rewards.function import CallError, RewardFunction, name_of, score, start_daemon
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure

LONGEST_WAIT_S = 2_000_000.0
Call = Callable[[list[Sample]], list[ScoreOrFailure]]


def call_reward_function(function: RewardFunction, samples: list[Sample]) -> list[float]:
    """Return the scores of all samples, computed in this process.

    Raises:
        RewardError: the function raised, or returned anything but a number for a sample.
    """
    results = score_or_raise(lambda batch: score(function, batch), samples)
    for result, sample in zip(results, samples, strict=True):
        if result.score is None:
            raise RewardError(f"reward function `{name_of(function)}` gave no score for {sample.where}; expected one")
    return [result.score for result in results]


def score_or_raise(call: Call, samples: list[Sample]) -> list[RewardResult]:
    """Return the results of `call` for all samples.

    Raises:
        RewardError: the call failed, or a sample has no score; it names the row at fault.
    """
    try:
        results = call(samples)
    except CallError as error:
        # Call again, one sample at a time, to name the row. Not after a time-out, which would cost the time again, and
        # not for a list of the wrong length, which has no row at fault.
        row = _row_at_fault(call, samples) if error.kind in ("raised", "died") else ""
        raise RewardError(f"{error.message}{row}") from (error.__cause__ or error)
    for result in results:
        if isinstance(result, ScoringFailure):
            raise RewardError(result.message)
    return results


def _row_at_fault(call: Call, samples: list[Sample]) -> str:
    for sample in samples:
        try:
            call([sample])
        except CallError:
            return f" (at {sample.where}, answer {sample.text[:80]!r})"
    return " (on the whole batch, on no single row)"


def score_with_bisection(call: Call, samples: list[Sample]) -> list[ScoreOrFailure]:
    """Return the result of `call` for each sample, with a `ScoringFailure` for a sample that it cannot score.

    A failed call is bisected, down to single samples. The number of time-outs is limited to the depth of one bisection;
    after that, the samples of every failed call count as failed.
    """
    timeouts_left = 1 + math.ceil(math.log2(max(len(samples), 1)))

    def bisect(batch: list[Sample]) -> list[ScoreOrFailure]:
        nonlocal timeouts_left
        try:
            return call(batch)
        except CallError as error:
            timeouts_left -= error.kind == "timeout"
            if len(batch) == 1 or timeouts_left <= 0:
                return [ScoringFailure(f"{error.message} (at {sample.where})") for sample in batch]
            half = len(batch) // 2
            return bisect(batch[:half]) + bisect(batch[half:])

    return bisect(samples)


def call_with_timeout(seconds: float, name: str, call: Callable[..., Any], *args: Any) -> Any:
    """Return `call(*args)`, computed in a thread for which this function waits `seconds` (0: no thread, no limit).

    Python cannot end a thread: after a time-out it continues in the background until the call returns.

    Raises:
        CallError: the call did not return in time.
    """
    if not seconds:
        return call(*args)
    future = start_daemon(f"reward {name}", call, *args)
    wait([future], timeout=wait_limit(seconds))
    if not future.done():
        raise CallError("timeout", timeout_message(name, seconds, args[-1] if args else []))
    return future.result()


def wait_limit(seconds: float) -> float | None:
    """Return a time limit as the system's calls take it. 0 and limits above 23 days are none: poll() counts 2^31 ms."""
    return seconds if 0 < seconds <= LONGEST_WAIT_S else None


def timeout_message(name: str, seconds: float, samples: Sequence[Sample]) -> str:
    """Return the message for a call that did not return in time."""
    first = f", the first of which is {samples[0].where}" if samples else ""
    return (
        f"reward function `{name}` took longer than {seconds:g} s for {len(samples)} samples{first}; make it faster, "
        "raise ppo.reward.timeout_seconds, or set ppo.reward.on_error to score or drop"
    )
