"""The reward composition of a run: its sources as configured, and the functions and HTTP scorers among them.

Every source scores all responses, sorted so that the responses to one prompt are adjacent. `on_error` is applied here,
the weights in ppo/scores.py. Reward models get their names here and become roles in ppo/setup.py.
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
from icegrt.rewards.http import ScoringClient
from icegrt.rewards.pool import Worker, WorkerPool
from icegrt.rewards.sample import RewardResult, Sample, ScoreOrFailure, ScoringFailure
from icegrt.utils.console import warn

MODEL_NAME = "reward_model"  # the name of the first reward model


@dataclass(frozen=True)
class SourceScores:
    """The results of one source for N responses, in their order.

    results: the source's result, or the substitute of `on_error` after a failure (a score of None drops the response).
    errors: the message of a failure, else None.
    """

    name: str
    weight: float
    results: list[RewardResult]
    errors: list[str | None]

    @property
    def score_or_nan_N(self) -> list[float]:
        """The source score of each response; NaN if the source returned none."""
        return [math.nan if r.score is None else r.score for r in self.results]


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """A reward source as configured, in a file or in Python.

    It has one of `model` (a checkpoint's path or a `transformers` model), `function` (`file.py:function` or a function)
    and `url`. `key` is the configuration key, for messages.
    """

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
        """Return the specification of an entry of `ppo.reward.sources`.

        Raises:
            ConfigError: the entry names none or several of model, function and url.
        """
        kinds = [kind for kind in ("model", "function", "url") if getattr(source, kind)]
        if len(kinds) != 1:
            text = " and ".join(kinds) if kinds else "no model, function or url"
            raise ConfigError(f"{key} names {text}; expected one of the three")
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


class Scorer(Protocol):
    """The running part of a source: a function or an HTTP scorer."""

    name: str
    weight: float

    @property
    def needs_main_thread(self) -> bool:
        """Whether `score` calls the function in the thread that calls it, which must be the main thread."""
        ...

    def start(self) -> None:
        """Load the function. Raises `ConfigError` if that fails."""

    def score(self, samples: list[Sample], collect_failures: bool) -> list[ScoreOrFailure]:
        """Return a result per sample; after a failure raise `RewardError`, unless `collect_failures`."""

    def close(self) -> None:
        """End its processes."""


class FunctionScorer:
    """A reward function, in worker processes or in this process.

    It runs in this process if `workers` is 0, or if it was passed as an object, which other processes cannot import.
    """

    def __init__(self, spec: RewardSpec, config: RewardCallConfig) -> None:
        self.name, self.weight = spec.name, spec.weight
        self._spec, self._config = spec, config
        self._function: Callable | None = None
        self._pool: WorkerPool | None = None

    @property
    def needs_main_thread(self) -> bool:
        return self._function is not None and not self._config.timeout_seconds

    def start(self) -> None:
        spec, config = self._spec, self._config
        options = (spec.style, spec.label_key, spec.key)
        if not isinstance(spec.function, str):
            self._function = adapt(spec.function, *options)
        elif config.workers:
            workers = [Worker(spec.function, *options, config.timeout_seconds) for _ in range(config.workers)]
            self._pool = WorkerPool(workers)
            self._pool.start()
        else:
            self._function = adapt(load_reward_function(spec.function, spec.key), *options)

    def score(self, samples: list[Sample], collect_failures: bool) -> list[ScoreOrFailure]:
        error_policy = score_with_bisection if collect_failures else score_or_raise
        if self._pool is not None:
            return self._pool.score(samples, error_policy)
        return error_policy(self._score_in_process, samples)

    def _score_in_process(self, samples: list[Sample]) -> list[ScoreOrFailure]:
        return call_with_timeout(self._config.timeout_seconds, self.name, score, self._function, samples)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


class HTTPScorer:
    """A scorer behind HTTP."""

    def __init__(self, spec: RewardSpec, config: RewardCallConfig, seed: int) -> None:
        self.name, self.weight = spec.name, spec.weight
        self._client = ScoringClient(spec.name, spec.url, config.http, key=spec.key, seed=seed)

    needs_main_thread = False

    def start(self) -> None: ...

    def score(self, samples: list[Sample], collect_failures: bool) -> list[ScoreOrFailure]:
        return self._client.score(samples) if collect_failures else score_or_raise(self._client.score, samples)

    def close(self) -> None: ...


class RewardSourceGroup:
    """The functions and HTTP scorers of a run. Close it, or use it in a `with`, to end the worker processes."""

    def __init__(self, scorers: Sequence[Scorer], config: RewardCallConfig) -> None:
        self.scorers, self._config = list(scorers), config

    def __bool__(self) -> bool:
        return bool(self.scorers)

    @property
    def needs_main_thread(self) -> bool:
        """Whether `score_by_source` must run in the main thread, for a function that runs there without a limit."""
        return any(scorer.needs_main_thread for scorer in self.scorers)

    @classmethod
    def of(cls, specs: Sequence[RewardSpec], config: RewardCallConfig, seed: int = 0) -> RewardSourceGroup:
        """Return a group with a scorer per specification. `start` loads the functions."""
        specs = named(specs)
        return cls([HTTPScorer(s, config, seed) if s.url else FunctionScorer(s, config) for s in specs], config)

    def start(self) -> None:
        """Load every function.

        Raises:
            ConfigError: a function cannot be loaded.
        """
        for scorer in self.scorers:
            scorer.start()

    def probe(self, samples: list[Sample]) -> None:
        """Score a few samples, to find broken sources before training.

        Raises:
            RewardError: a source fails on all samples, for any `on_error`.
        """
        for scores in self.score_by_source(samples, warn_of_failures=False):
            if all(scores.errors):
                raise RewardError(f"`{scores.name}` could score none of {len(samples)} answers: {scores.errors[0]}")

    def score_by_source(self, samples: list[Sample], *, warn_of_failures: bool = True) -> list[SourceScores]:
        """Score the samples with every function and HTTP scorer, one source after another.

        Args:
            samples: responses in any order; a source receives those of one prompt adjacent.
            warn_of_failures: print a warning for each source that failed on a response.

        Returns:
            The results of each source, each in the order of `samples`.

        Raises:
            RewardError: a source failed, with `on_error: stop`.
        """
        samples = _grouped_by_prompt(samples)
        order = sorted(range(len(samples)), key=lambda i: (samples[i].group, samples[i].index))
        ordered = [samples[i] for i in order]
        scores_by_source = []
        for scorer in self.scorers:
            results: list[Any] = [None] * len(samples)
            if samples:
                ordered_results = scorer.score(ordered, self._config.on_error != "stop")
                for index, result in zip(order, ordered_results, strict=True):
                    results[index] = result
            scores_by_source.append(self._apply_on_error(scorer, results))
            if warn_of_failures:
                _warn_of_failures(scores_by_source[-1], self._config)
        return scores_by_source

    def _apply_on_error(self, scorer: Scorer, results: list[ScoreOrFailure]) -> SourceScores:
        substitute = RewardResult(self._config.error_score if self._config.on_error == "score" else None)
        return SourceScores(
            scorer.name,
            scorer.weight,
            [substitute if isinstance(r, ScoringFailure) else r for r in results],
            [r.message if isinstance(r, ScoringFailure) else None for r in results],
        )

    def close(self) -> None:
        """End all worker processes."""
        for scorer in self.scorers:
            scorer.close()

    def __enter__(self) -> RewardSourceGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def named(specs: Sequence[RewardSpec]) -> list[RewardSpec]:
    """Return the specifications, each with a unique name: the configured one, or one from the function or the host.

    Raises:
        ConfigError: a configured name occurs twice, is reserved, or has other characters than allowed.
    """
    # 1. check the configured names
    configured = [spec.name for spec in specs if spec.name]
    first_model = next((spec for spec in specs if spec.model is not None), None)
    for spec in specs:
        is_reserved = spec.name == MODEL_NAME and spec is not first_model
        if is_reserved or (spec.name and configured.count(spec.name) > 1):
            reason = "is the name of the reward model" if is_reserved else "is given twice"
            raise ConfigError(f"{spec.key}.name: `{spec.name}` {reason}; give each source a name of its own")
        if not re.fullmatch(r"[\w.:-]*", spec.name):
            raise ConfigError(f"{spec.key}.name: expected letters, digits and any of . _ : -, got {spec.name!r}")
    # 2. name the others; a number distinguishes equal names
    used, named_specs = {*configured, MODEL_NAME}, []
    for spec in specs:
        base = re.sub(r"[^\w.:-]", "_", _default_name(spec))
        candidates = (base if i == 1 else f"{base}_{i}" for i in range(1, len(specs) + 3))
        default = MODEL_NAME if spec is first_model else next(name for name in candidates if name not in used)
        named_specs.append(replace(spec, name=spec.name or default))
        used.add(named_specs[-1].name)
    return named_specs


def _grouped_by_prompt(samples: list[Sample]) -> list[Sample]:
    """Return the samples with one group for all answers to equal prompts, which may come from several rows."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        members.setdefault(tuple(sample.prompt_tokens), []).append(i)
    grouped = list(samples)
    for positions in members.values():
        if len({samples[i].group for i in positions}) > 1:
            ordered = sorted(positions, key=lambda i: (samples[i].group, samples[i].index))
            for index, i in enumerate(ordered):
                grouped[i] = replace(samples[i], group=samples[ordered[0]].group, index=index)
    return grouped


def _default_name(spec: RewardSpec) -> str:
    if spec.model is not None:
        return MODEL_NAME
    if spec.url:
        return re.sub(r"^\w+://(?:[^/?#]*@)?([^/?#]*).*", r"\1", spec.url)
    return spec.function.rpartition(":")[2] if isinstance(spec.function, str) else name_of(spec.function)


def _warn_of_failures(scores: SourceScores, config: RewardCallConfig) -> None:
    errors = [error for error in scores.errors if error]
    if errors:
        treatment = f"scored {config.error_score:g}" if config.on_error == "score" else "dropped from the update"
        warn(
            f"`{scores.name}` failed on {len(errors)} of {len(scores.errors)} responses, {treatment}; the first: "
            f"{errors[0]}"
        )
