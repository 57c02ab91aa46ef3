"""What to do about a call that fails: stop with the row at fault, or grade what can be graded; and how long to wait."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from icegrt.errors import RewardError
from icegrt.rewards.function import CallError, RewardFunction, name_of, score
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure

Call = Callable[[list[Sample]], list[ScoreOrFailure]]


def call_reward_function(function: RewardFunction, samples: list[Sample]) -> list[float]:
    """The scores of all samples, in this process. Raises `RewardError` for an exception and anything but a number."""
    results = score_or_raise(lambda part: score(function, part), samples)
    for result, sample in zip(results, samples, strict=True):
        if result.score is None:
            raise RewardError(f"reward function `{name_of(function)}` gave no score for {sample.where}; expected one")
    return [result.score for result in results]


def score_or_raise(call: Call, samples: list[Sample]) -> list[RewardResult]:
    """What `call` says of all samples; anything else is a `RewardError` that names the row at fault."""
    try:
        results = call(samples)
    except CallError as error:
        # Called again one by one: a crash over a batch is no help without the row that caused it. A second time-out
        # would only cost more time, and a list of the wrong length has no row.
        place = _row_at_fault(call, samples) if error.kind in ("raised", "died") else ""
        raise RewardError(f"{error.message}{place}") from (error.__cause__ or error)
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
    """What `call` says of each sample, a `ScoringFailure` for those that it cannot grade.

    A failed call is repeated in halves, down to single samples. Time-outs cost time: after as many as it takes to find
    one culprit, what is left of the failed calls counts as failed too.
    """
    patience = [1 + math.ceil(math.log2(max(len(samples), 1)))]

    def attempt(part: list[Sample]) -> list[ScoreOrFailure]:
        try:
            return call(part)
        except CallError as error:
            patience[0] -= error.kind == "timeout"
            if len(part) == 1 or patience[0] <= 0:
                return [ScoringFailure(f"{error.message} (at {sample.where})") for sample in part]
            half = len(part) // 2
            return attempt(part[:half]) + attempt(part[half:])

    return attempt(samples)


def call_with_timeout(seconds: float, name: str, call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)`, in a thread that is given up after `seconds` (0: called directly). Raises `CallError`.

    A thread cannot be ended from outside: one that is given up runs on beside the training until it returns.
    """
    if not seconds:
        return call(*args)
    box: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            box.append((True, call(*args)))
        except BaseException as error:  # the caller's to handle, KeyboardInterrupt included
            box.append((False, error))

    thread = threading.Thread(target=run, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise CallError("timeout", timed_out(name, seconds, args[-1] if args else []))
    ok, value = box[0]
    if ok:
        return value
    raise value


def timed_out(name: str, seconds: float, samples: Sequence[Sample]) -> str:
    """The message for a call that took too long."""
    first = f", the first of which is {samples[0].where}" if samples else ""
    return (
        f"reward function `{name}` took longer than {seconds:g} s for {len(samples)} samples{first}; make it faster, "
        "raise ppo.reward.timeout_seconds, or set ppo.reward.on_error to score or drop"
    )
