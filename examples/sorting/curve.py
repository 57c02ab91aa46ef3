"""Exact match on held-out prompts while SFT runs, and the curves of a run over its seconds of training."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icegrt import RolloutEngine, Sampling
from icegrt.data import Prompt
from icegrt.metrics import read_metrics
from icegrt.rollout.samples import sample_of
from icegrt.utils.console import is_main
from icegrt.utils.files import write_text_atomic
from sorting.reward import exact_match
from staged_run.assessment import read_prompts

__all__ = [
    "Curve",
    "ExactMatchCurve",
    "evaluations",
    "measure",
    "ppo_curve",
    "sft_curve",
    "sft_seconds_per_step",
]

FILE = "exact_match.jsonl"
MAX_NEW_TOKENS = 12


@dataclasses.dataclass(frozen=True)
class Curve:
    """Exact match over seconds of training, evaluations and checkpoints left out."""

    seconds: list[float]
    exact_match: list[float]

    def after(self, seconds: float) -> "Curve":
        """Return the curve of training that began `seconds` later."""
        return dataclasses.replace(self, seconds=[seconds + x for x in self.seconds])


def measure(trainer: Any, prompts: Sequence[Prompt], samples: int = 1, *, greedy: bool = False) -> float:
    """Return the fraction of answers of an SFT trainer's model that are right. Collective.

    Args:
        trainer: its first role answers.
        prompts: held-out prompts with a column `answer`.
        samples: answers to each, at temperature 1.
        greedy: take the most probable tokens.
    """
    sampling = Sampling(temperature=0.0 if greedy else 1.0, max_new_tokens=MAX_NEW_TOKENS, seed=trainer.run.seed)
    engine = RolloutEngine(trainer.roles[0].model, trainer.tokenizer, max_batch=512)
    responses = engine.generate([prompt.tokens for prompt in prompts], samples, sampling)
    engine.release()
    scores = exact_match([sample_of(trainer.tokenizer, r, prompts[r.prompt_index]) for r in responses])
    return sum(scores) / len(scores)


class ExactMatchCurve:
    """A callback of SFT that measures exact match every `every` steps and at the end.

    The points are rows of `exact_match.jsonl` in the run's folder. A resumed run drops those beyond its checkpoint.
    """

    def __init__(self, prompts: Path, every: int) -> None:
        self.path, self.every = prompts, every
        self._prompts: Sequence[Prompt] | None = None

    def on_update(self, trainer: Any, step: Any) -> None:
        """Measure and write a point, if one is due."""
        if step.step % self.every and step.step < trainer.total_steps:
            return
        if self._prompts is None:
            self._prompts = read_prompts(self.path, trainer)
        point = {"step": step.step, "exact_match": measure(trainer, self._prompts)}
        if is_main():
            path = trainer.dir / FILE
            points = [row for row in _points(path) if row["step"] < step.step]
            write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in [*points, point]))


def sft_curve(run: Path) -> Curve:
    """Return the curve of an SFT run whose callback was an `ExactMatchCurve`."""
    seconds, seconds_at = 0.0, {}
    for row in _sft_steps(run):
        seconds += row["tokens"] / row["tokens_per_second"]
        seconds_at[row["step"]] = seconds
    points = _points(run / FILE)
    return Curve([seconds_at[point["step"]] for point in points], [point["exact_match"] for point in points])


def sft_seconds_per_step(run: Path) -> float:
    """Return the median seconds of an SFT run's optimizer steps; the first steps are slower than the others."""
    return statistics.median(row["tokens"] / row["tokens_per_second"] for row in _sft_steps(run))


def ppo_curve(run: Path) -> Curve:
    """Return the curve of a PPO run: its evaluations, the first one before training."""
    seconds, seconds_at = 0.0, {0: 0.0}
    for row in read_metrics(run):
        if row["kind"] == "ppo":
            phases = row["seconds_by_phase"]
            seconds += sum(phases[name] for name in phases if name not in ("evaluate", "checkpoint"))
            seconds_at[row["iteration"]] = seconds
    points = evaluations(run)
    return Curve(
        [seconds_at[point["iteration"]] for point in points], [point["function_score_mean"] for point in points]
    )


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a PPO run, the first one before training. `function_score_mean` is the exact match."""
    rows = read_metrics(run)
    later = [row["evaluation"] for row in rows if row["kind"] == "ppo" and row.get("evaluation")]
    return [*(row for row in rows if row["kind"] == "evaluation"), *later]


def _sft_steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["kind"] == "sft"]


def _points(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
