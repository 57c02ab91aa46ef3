"""What a run may be paid by, as it was asked for; and its functions and HTTP scorers: called, and what they failed on.

Each source grades all responses, sorted so that the answers to one prompt stand together. What `on_error` says is
applied here; weights are applied where the total is formed. Reward models are named here, and made roles elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from icegrt.config import RewardCallConfig, RewardSource
from icegrt.errors import ConfigError, RewardError
from icegrt.rewards.compat import adapt
from icegrt.rewards.error_policy import call_with_timeout, score_or_raise, score_with_bisection
from icegrt.rewards.function import load_reward_function, name_of, score
from icegrt.rewards.http import HTTPScorer
from icegrt.rewards.pool import Worker, WorkerPool
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure
from icegrt.utils.console import warn

# What the first reward model is called that has no name of its own.
MODEL_NAME = "reward_model"


@dataclass(frozen=True)
class SourceScores:
    """What one source said of N responses, in their order.

    results: for a response that it failed on, what `on_error` makes of it (a score of None drops it).
    errors: why it failed, None where it did not.
    """

    name: str
    weight: float
    results: list[RewardResult]
    errors: list[str | None]

    @property
    def scores(self) -> list[float]:
        """A score per response, NaN where the source has none."""
        return [math.nan if r.score is None else r.score for r in self.results]


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """A source as it was asked for: one of `model` (a checkpoint's path, or a `transformers` model), `function`
    (`file.py:function`, or the function itself) and `url`. `key` is for messages."""

    model: Any = None
    function: str | Callable | None = None
    url: str = ""
    name: str = ""
    weight: float = 1.0
    style: str = "auto"
    label_key: str = ""
    key: str = "reward"

    @classmethod
    def of(cls, source: RewardSource, key: str) -> RewardSpec:
        """From an entry of `ppo.reward.sources`. Raises `ConfigError` unless it names one thing to call."""
        given = [what for what in ("model", "function", "url") if getattr(source, what)]
        if len(given) != 1:
            what = " and ".join(given) if given else "no model, function or url"
            raise ConfigError(f"{key} names {what}; expected one of the three")
        return cls(
            model=source.model or None,
            function=source.function or None,
            url=source.url,
            name=source.name,
            weight=source.weight,
            style=source.style,
            label_key=source.label_key,
            key=key,
        )


class Source(Protocol):
    """Something that grades samples."""

    name: str
    weight: float

    def start(self) -> None:
        """Find out now whether it can be used. Raises `ConfigError`."""

    def score(self, samples: list[Sample], keep_going: bool) -> list[ScoreOrFailure]:
        """A result per sample; failures only with `keep_going`, else `RewardError`."""

    def close(self) -> None:
        """Let go of processes."""


class FunctionSource:
    """A function in worker processes, or in this process: 0 workers, or a function that only this process has."""

    def __init__(self, name: str, entry: RewardSpec, how: RewardCallConfig) -> None:
        self.name, self.weight = name, entry.weight
        self._entry, self._how = entry, how
        self._function: Callable | None = None
        self._pool: WorkerPool | None = None

    def start(self) -> None:
        entry, how, key = self._entry, self._how, self._entry.key
        form = (entry.style, entry.label_key, key)
        if not isinstance(entry.function, str):
            self._function = adapt(entry.function, *form)
        elif how.workers:
            workers = [Worker(entry.function, *form, how.timeout_seconds) for _ in range(how.workers)]
            self._pool = WorkerPool(workers)
            self._pool.start()
        else:
            self._function = adapt(load_reward_function(entry.function, key), *form)

    def score(self, samples: list[Sample], keep_going: bool) -> list[ScoreOrFailure]:
        how = score_with_bisection if keep_going else score_or_raise
        if self._pool is not None:
            return self._pool.score(samples, how)
        return how(self._in_this_process, samples)

    def _in_this_process(self, samples: list[Sample]) -> list[ScoreOrFailure]:
        return call_with_timeout(self._how.timeout_seconds, self.name, score, self._function, samples)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


class HTTPSource:
    """An HTTP scorer as a source."""

    def __init__(self, name: str, entry: RewardSpec, how: RewardCallConfig, seed: int) -> None:
        self.name, self.weight = name, entry.weight
        self._scorer = HTTPScorer(name, entry.url, how.http, key=entry.key, seed=seed)

    def start(self) -> None: ...

    def score(self, samples: list[Sample], keep_going: bool) -> list[ScoreOrFailure]:
        return self._scorer.score(samples) if keep_going else score_or_raise(self._scorer.score, samples)

    def close(self) -> None: ...


class RewardSourceGroup:
    """The functions and HTTP scorers of a run. Close it, or use it in a `with`: worker processes hang on it."""

    def __init__(self, sources: Sequence[Source], how: RewardCallConfig) -> None:
        self.sources, self._how = list(sources), how

    def __bool__(self) -> bool:
        return bool(self.sources)

    @classmethod
    def of(cls, entries: Sequence[RewardSpec], how: RewardCallConfig, seed: int = 0) -> RewardSourceGroup:
        """Sources for the entries, each with a name of its own. Nothing is loaded yet: see `start`."""
        made = [HTTPSource(e.name, e, how, seed) if e.url else FunctionSource(e.name, e, how) for e in named(entries)]
        return cls(made, how)

    def start(self) -> None:
        """Load every function. Raises `ConfigError` for one that cannot be."""
        for source in self.sources:
            source.start()

    def probe(self, samples: list[Sample]) -> None:
        """Grade a few samples; a source that fails on all of them is refused whatever `on_error` says."""
        for source, scores in zip(self.sources, self.score(samples, quietly=True), strict=True):
            if all(scores.errors):
                raise RewardError(f"`{source.name}` could score none of {len(samples)} answers: {scores.errors[0]}")

    def score(self, samples: list[Sample], *, quietly: bool = False) -> list[SourceScores]:
        """What every source says of the samples. Raises `RewardError` with `on_error: stop`."""
        order = sorted(range(len(samples)), key=lambda i: (samples[i].group, samples[i].index))
        ordered = [samples[i] for i in order]
        found = []
        for source in self.sources:
            scored: list[Any] = [None] * len(samples)
            if samples:
                for place, result in zip(order, source.score(ordered, self._how.on_error != "stop"), strict=True):
                    scored[place] = result
            found.append(self._apply_on_error(source, scored))
            if not quietly:
                _warn_of_failures(found[-1], self._how)
        return found

    def _apply_on_error(self, source: Source, scored: list[ScoreOrFailure]) -> SourceScores:
        instead = RewardResult(self._how.error_score if self._how.on_error == "score" else None)
        return SourceScores(
            source.name,
            source.weight,
            [instead if isinstance(g, ScoringFailure) else g for g in scored],
            [g.message if isinstance(g, ScoringFailure) else None for g in scored],
        )

    def close(self) -> None:
        """End all worker processes."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> RewardSourceGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def named(entries: Sequence[RewardSpec]) -> list[RewardSpec]:
    """Every entry with a name: its own, or one made of the function or the host; made ones are numbered apart.

    Raises `ConfigError` for a name that is given twice, or that is not one.
    """
    said = [entry.name for entry in entries if entry.name]
    first_model = next((entry for entry in entries if entry.model is not None), None)
    for entry in entries:
        taken_away = entry.name == MODEL_NAME and entry is not first_model
        if taken_away or (entry.name and said.count(entry.name) > 1):
            why = "is what the reward model is called" if taken_away else "is given twice"
            raise ConfigError(f"{entry.key}.name: `{entry.name}` {why}; give each source a name of its own")
        if not re.fullmatch(r"[\w.:-]*", entry.name):
            raise ConfigError(f"{entry.key}.name: expected letters, digits and any of . _ : -, got {entry.name!r}")
    taken, found = {*said, MODEL_NAME}, []
    for entry in entries:
        base = re.sub(r"[^\w.:-]", "_", _made_name(entry))
        numbered = (base if i == 1 else f"{base}_{i}" for i in range(1, len(entries) + 3))
        made = MODEL_NAME if entry is first_model else next(name for name in numbered if name not in taken)
        found.append(replace(entry, name=entry.name or made))
        taken.add(found[-1].name)
    return found


def _made_name(entry: RewardSpec) -> str:
    if entry.model is not None:
        return MODEL_NAME
    if entry.url:
        return re.sub(r"^\w+://(?:[^/?#]*@)?([^/?#]*).*", r"\1", entry.url)
    return entry.function.rpartition(":")[2] if isinstance(entry.function, str) else name_of(entry.function)


def _warn_of_failures(scores: SourceScores, how: RewardCallConfig) -> None:
    failed = [error for error in scores.errors if error]
    if failed:
        what = f"scored {how.error_score:g}" if how.on_error == "score" else "left out of the update"
        warn(
            f"`{scores.name}` failed on {len(failed)} of {len(scores.errors)} responses, {what}; the first: {failed[0]}"
        )
