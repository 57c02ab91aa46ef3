"""What a stage measures: the objects that iterating a trainer yields, and the files they are written to.

`RunLog` writes one JSON object per step to `metrics.jsonl` (flushed, always valid JSON) and the same numbers, under the
same names, as TensorBoard scalars and to the loggers of `metrics_sinks`. Steps and iterations count from 1; an
`Evaluation` of iteration 0 is the one before training.
Only one rank opens a `RunLog`: what it is given is already reduced over ranks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from icegrt.errors import DataError, RunError
from icegrt.metrics.sinks import open_sinks

__all__ = [
    "PHASES",
    "Evaluation",
    "JsonlWriter",
    "PPOStep",
    "RewardStep",
    "RunLog",
    "SFTStep",
    "drop_rollouts",
    "json_safe",
    "read_metrics",
    "rollout_path",
    "step_from_row",
    "write_text_aside",
]

PHASES = ("rollout", "plan", "score", "shape", "update", "evaluate", "checkpoint")
METRICS_FILE = "metrics.jsonl"
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Answers to the held-out prompts, scored. The first fields are of sampled answers, `greedy_*` of greedy ones."""

    iteration: int
    prompts: int
    score_mean: float
    reward_model_score_mean: float | None = None
    function_score_mean: float | None = None
    kl_nats_per_response: float
    response_tokens_mean: float
    truncated_fraction: float
    distinct_fraction: float
    greedy_score_mean: float | None = None
    greedy_reward_model_score_mean: float | None = None
    greedy_function_score_mean: float | None = None
    greedy_response_tokens_mean: float | None = None
    greedy_truncated_fraction: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOStep:
    """One PPO iteration, over all ranks. Means are per response where the name does not say `per_token`."""

    iteration: int
    # What the responses were worth.
    score_mean: float  # total score per response, before clipping
    reward_model_score_mean: float | None = None  # the first one's, raw, before scaling; None without a reward model
    function_score_mean: float | None = None  # None without a reward function
    score_std: float
    reward_mean: float  # score as clipped and scaled, minus the KL penalty
    # How far the actor is from the reference, and how sure of itself.
    kl_nats_per_response: float
    kl_coef: float
    entropy_nats_per_token: float
    # The update.
    clip_fraction: float
    ratio_min: float
    ratio_max: float
    approx_kl_nats_per_token: float  # from the policy that sampled to the updated one
    policy_loss: float
    value_loss: float
    value_explained_variance: float
    ptx_loss: float | None = None
    advantage_mean: float  # before whitening
    advantage_std: float
    grad_norm_actor: float
    grad_norm_critic: float
    lr_actor: float
    lr_critic: float
    skipped_steps: int = 0  # optimizer steps skipped in this iteration: loss or gradient not finite
    empty_steps: int = 0  # optimizer steps not taken: every response of their minibatch was dropped
    # The responses and what they cost.
    response_tokens_mean: float
    truncated_fraction: float  # finish reason, never inferred from a length
    response_tokens: int
    response_tokens_per_second: float  # over the whole iteration, evaluation and checkpoint left out
    rollout_logprob_gap_max: float  # |log-prob in rollout - log-prob in scoring|, nats, the largest of any token
    padding_fraction: float  # alignment tail over all tokens
    # By source of reward: score_mean, score_std, errors, and metrics/NAME_mean, _std for what it gave beside the score;
    # of reward models the raw score, and the weight of those beyond the first.
    sources: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    reward_errors: int = 0  # responses that a source failed on, counted once for each source
    dropped_responses: int = 0  # left out of the update because a source failed on them
    seconds_by_phase: dict[str, float] = dataclasses.field(default_factory=dict)  # keys: PHASES
    evaluation: Evaluation | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTStep:
    """One optimizer step of supervised fine-tuning; losses in nats per response token."""

    step: int
    epoch: float
    loss: float
    heldout_loss: float | None = None
    tokens: int
    tokens_per_second: float
    lr: float
    grad_norm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardStep:
    """One optimizer step of the reward model; losses in nats per pair, accuracies over untied pairs."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    heldout_loss: float | None = None
    heldout_accuracy: float | None = None
    lr: float
    grad_norm: float


Step = PPOStep | SFTStep | RewardStep | Evaluation
_KINDS = {PPOStep: "ppo", SFTStep: "sft", RewardStep: "reward", Evaluation: "evaluation"}


class RunLog:
    """`metrics.jsonl`, TensorBoard scalars and further loggers of one run.

    dir: the run's folder. resume_from_step: the last step that the checkpoint holds (0: none yet; -1: not even an
    evaluation before); rows beyond it are dropped, so that no step is there twice. None starts anew and refuses a
    folder that has metrics already.
    log_to: names of further loggers (wandb, mlflow), which are also given `config`, its secrets hidden already.
    """

    def __init__(
        self,
        dir: str | Path,
        resume_from_step: int | None = None,
        *,
        tensorboard: bool = True,
        log_to: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        self.dir = Path(dir)
        self.path = self.dir / METRICS_FILE
        self._resume_from_step = resume_from_step
        self._tensorboard = tensorboard
        self._writer: Any = None
        self.dir.mkdir(parents=True, exist_ok=True)
        if resume_from_step is None:
            if self.path.exists() and self.path.stat().st_size:
                raise RunError(
                    f"{self.path} already holds the metrics of a run. Set run.resume=true to continue it, "
                    f"or point run.dir to an empty folder."
                )
        elif self.path.exists():
            kept = [row for row in read_metrics(self.dir) if _index(row) <= resume_from_step]
            write_text_aside(self.path, "".join(_line(row) for row in kept))
        self._sinks = open_sinks(log_to, self.dir, config or {}, resume_from_step is not None)
        self._file = _open(self.path, "a")

    def log(self, step: Step) -> None:
        """Write one step: a line of JSON, flushed, and its numbers as scalars for every other logger."""
        row = {"kind": _KINDS[type(step)], **json_safe(step)}
        self._file.write(_line(row))
        self._file.flush()
        restored = _restored(row)
        if self._tensorboard:
            self._log_scalars(restored)
        for sink in self._sinks:
            sink.write(dict(_scalars(row["kind"], restored)), _index(row))

    def sync(self) -> None:
        """See to it that all rows are on the disk: a checkpoint that outlived its row could not bring it back."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close all loggers. Closing twice does nothing."""
        self._file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._tensorboard = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log_scalars(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                _logger.warning("tensorboard is not installed: scalars are in %s only", self.path)
                self._tensorboard = False
                return
            purge = None if self._resume_from_step is None else self._resume_from_step + 1
            self._writer = SummaryWriter(str(self.dir / "tensorboard"), purge_step=purge)
        index = _index(row)
        for name, value in _scalars(row["kind"], row):
            self._writer.add_scalar(name, value, index)
        self._writer.flush()


class JsonlWriter:
    """Rows of JSON, one per line, written aside and renamed on close: the file is there whole or not at all.

    As a context manager it leaves no file behind when the block raises.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.path.with_name(f".{self.path.name}.partial")
        self._file = _open(self._aside, "w")

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; numbers that are not finite become the strings NaN, Infinity and -Infinity."""
        self._file.write(_line(row))

    def close(self) -> None:
        """Make the file visible under its name. Closing twice does nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._aside, self.path)

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            self._aside.unlink(missing_ok=True)


def rollout_path(dir: str | Path, iteration: int) -> Path:
    """Where an iteration's responses are kept: `<dir>/rollouts/iteration_00012.jsonl`."""
    return Path(dir) / "rollouts" / f"iteration_{iteration:05d}.jsonl"


def drop_rollouts(dir: str | Path, after: int) -> None:
    """Remove the responses of iterations beyond `after`, which a resumed run will sample again."""
    for path in rollout_path(dir, 0).parent.glob("iteration_*.jsonl"):
        if int(path.stem.removeprefix("iteration_")) > after:
            path.unlink()


def read_metrics(dir: str | Path) -> list[dict[str, Any]]:
    """All rows of a run's `metrics.jsonl`, in order; a step logged twice counts once, as last logged.

    Each row has `kind` (ppo, sft, reward, evaluation). A last line cut short is left out; any other line that is no
    JSON raises `DataError`. A folder without the file gives no rows.
    """
    path = Path(dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(lines[: last + 1], 1):
        if not line.strip():
            continue
        try:
            row = _restored(json.loads(line.decode("utf-8")))
            key = (row["kind"], _index(row))
        except (ValueError, KeyError, TypeError) as error:
            if number == last + 1:
                break
            raise DataError(f"{path}, line {number}: not a row of metrics ({error}). Restore or remove it.") from None
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def step_from_row(row: dict[str, Any]) -> Step:
    """The step that a row of `read_metrics` was written from; keys that the class does not know are left out."""
    cls = next(c for c, kind in _KINDS.items() if kind == row["kind"])
    names = {field.name for field in dataclasses.fields(cls)}
    values = {k: v for k, v in row.items() if k in names}
    if values.get("evaluation") is not None:
        values["evaluation"] = step_from_row({"kind": "evaluation", **values["evaluation"]})
    return cls(**values)


def json_safe(value: Any, *, not_finite_as_null: bool = False) -> Any:
    """`value` as plain JSON types: scalars and arrays of torch and numpy become numbers and lists.

    NaN and infinities become the strings NaN, Infinity and -Infinity, or null. Raises TypeError for anything else.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if not_finite_as_null else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): json_safe(v, not_finite_as_null=not_finite_as_null) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v, not_finite_as_null=not_finite_as_null) for v in value]
    if hasattr(value, "tolist"):
        return json_safe(value.tolist(), not_finite_as_null=not_finite_as_null)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: give a number, text, list or dict")


def write_text_aside(path: str | Path, text: str) -> None:
    """Write `text` beside `path`, then rename: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    with _open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _open(path: Path, mode: str) -> TextIO:
    """UTF-8; a lone surrogate becomes its JSON escape, and no platform turns line ends into something else."""
    return open(path, mode, encoding="utf-8", errors="backslashreplace", newline="\n")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n"


def _index(row: dict[str, Any]) -> int:
    return int(row["iteration"] if "iteration" in row else row["step"])


def _restored(value: Any) -> Any:
    """The inverse of `json_safe` for numbers: the strings NaN, Infinity and -Infinity become floats again."""
    if isinstance(value, dict):
        return {k: _restored(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v) for v in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _scalars(prefix: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(key if key == "evaluation" else f"{prefix}/{key}", value)
        elif isinstance(value, str) or value is None or key in ("iteration", "step"):
            continue
        else:
            yield f"{prefix}/{key}", float(value)
