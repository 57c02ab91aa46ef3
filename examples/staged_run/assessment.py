"""Answers to test prompts before and after training: files, scores by prompt, gains, and examples to show."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icegrt import PPOConfig
from icegrt.data import EncodedDataset, Prompt, PromptEncoder, open_rows
from icegrt.metrics import read_metrics
from icegrt.metrics.statistics import distinct_fraction, paired_bootstrap_ci95

__all__ = [
    "PPOOutcome",
    "answer_figures",
    "assess_answers",
    "columns",
    "example_rows",
    "gain",
    "greedy_examples",
    "per_prompt",
    "read_json",
    "read_prompts",
    "run_figures",
    "score_gains",
]


class PPOOutcome:
    """The files of a finished PPO stage in `out`, as figures of an example's report.

    Args:
        out: folder of the run.
        rows: of the test data, with `data`.

    Attributes:
        before, after: assessments of the test data.
        config: of PPO.
        steps: rows of its metrics.
        rows: of the test data, as objects.
    """

    def __init__(self, out: Path, rows: Iterable[Any]) -> None:
        self.out = out
        self.before, self.after = (read_json(out / f"assessment_{when}.json") for when in ("before", "after"))
        self.config = PPOConfig.load(out / "ppo" / "config.yaml")
        self.steps = [row for row in read_metrics(out / "ppo") if row["kind"] == "ppo"]
        self.rows = [row.data for row in rows]

    def task_figures(self) -> dict[str, Any]:
        """Return the report's figures of a run whose task score is the whole reward."""
        # 1. scores before and after, with intervals
        figures: dict[str, Any] = {"test_prompts": len(self.rows), "heldout_reward_name": "total score"}
        figures |= score_gains(self.before, self.after)
        # 2. figures of the answers and of the run
        return figures | self.training_figures()

    def training_figures(self) -> dict[str, Any]:
        """Return the report's figures of the sampled answers before and after training, and of the run."""
        figures: dict[str, Any] = {"iterations": len(self.steps)}
        for when, document in (("before", self.before), ("after", self.after)):
            figures |= answer_figures(when, document["sampled"])
        figures["kl_nats_per_response"] = float(np.mean(self.after["sampled"]["kl"]))
        return figures | run_figures(self.steps, self.out / "ppo")


def read_prompts(path: Path, trainer: Any) -> Sequence[Prompt]:
    """Return the prompts of a JSONL file as tokens of the trainer's model."""
    context = trainer.roles[0].model.architecture.context_length
    return EncodedDataset(open_rows(path), PromptEncoder(trainer.tokenizer, context))


def assess_answers(trainer: Any, prompts: Sequence[Prompt], samples: int) -> dict[str, dict[str, list]]:
    """Return `samples` scored answers and one greedy answer of PPO's actor to each prompt, as JSON. Collective."""
    return {
        "sampled": columns(trainer.assess(prompts, samples)),
        "greedy": columns(trainer.assess(prompts, 1, greedy=True)),
    }


def columns(assessment: Any) -> dict[str, list]:
    """Return the answers and scores of an `EvaluationResult` as JSON columns, one entry per answer."""
    return {
        "prompt": [r.prompt_index for r in assessment.responses],
        "text": [s.text for s in assessment.samples],
        "task": assessment.function_N.tolist(),
        "reward_model": None if assessment.reward_model_N is None else assessment.reward_model_N.tolist(),
        "kl": None if assessment.kl_N is None else assessment.kl_N.tolist(),
        "tokens": assessment.tokens_N.tolist(),
        "truncated": assessment.truncated_N.tolist(),
    }


def per_prompt(values: Any, document: Mapping[str, list]) -> np.ndarray:
    """Return the mean of `values`, one per answer, over the answers to each prompt."""
    prompt = np.array(document["prompt"])
    return np.bincount(prompt, weights=np.asarray(values, float)) / np.bincount(prompt)


def gain(name: str, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Return the report's figures of one score: its means, and the 95% interval of the gain, paired over prompts."""
    return {
        f"{name}_before": float(before.mean()),
        f"{name}_after": float(after.mean()),
        f"{name}_gain_ci95": list(paired_bootstrap_ci95(before, after)),
    }


def score_gains(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the gains where the task score is the whole reward: sampled, as the total score too, and greedy."""
    figures: dict[str, Any] = {}
    for name, mode in (("task_score", "sampled"), ("heldout_reward", "sampled"), ("greedy_task_score", "greedy")):
        figures |= gain(name, *(per_prompt(document[mode]["task"], document[mode]) for document in (before, after)))
    return figures


def answer_figures(when: str, answers: Mapping[str, list]) -> dict[str, float]:
    """Return the report's figures of sampled answers "before" or "after": distinct ones, length, truncated ones."""
    return {
        f"distinct_fraction_{when}": distinct_fraction(answers["text"]),
        f"response_tokens_mean_{when}": float(np.mean(answers["tokens"])),
        f"truncated_fraction_{when}": float(np.mean(answers["truncated"])),
    }


def run_figures(steps: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return the report's figures of a PPO run: throughput, seconds by phase, alarms.

    Args:
        steps: rows of its metrics.
        folder: of the run, with its summary.
    """
    return {
        "response_tokens_per_second": float(np.median([step["response_tokens_per_second"] for step in steps])),
        "seconds_by_phase": seconds_by_phase(steps),
        "alarms": read_json(folder / "summary.json")["alarms"],
    }


def greedy_examples(
    rows: list[dict[str, Any]], before: Mapping[str, Any], after: Mapping[str, Any], fixed: int, drawn: int
) -> list[dict[str, Any]]:
    """Return examples for the page: prompt, reference answer, and the greedy answers with their scores.

    Args:
        rows: of the test data, with `prompt` and `answer`.
        before, after: assessments.
        fixed, drawn: number of first rows, and of rows drawn at random.
    """
    examples = []
    for n, kind in example_rows(len(rows), fixed, drawn):
        example = {"kind": kind, "prompt": rows[n]["prompt"], "reference": rows[n]["answer"]}
        for when, document in (("before", before), ("after", after)):
            greedy = document["greedy"]
            example |= {when: greedy["text"][n], f"{when}_score": greedy["task"][n]}
        examples.append(example)
    return examples


def example_rows(rows: int, fixed: int, drawn: int) -> list[tuple[int, str]]:
    """Return (row, kind) of the examples to show: the first rows, and others drawn at random from the rest."""
    sample = random.Random(rows).sample(range(fixed, rows), drawn)
    return [(n, "fixed") for n in range(fixed)] + [(n, "random") for n in sorted(sample)]


def seconds_by_phase(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each phase, summed over iterations."""
    totals: dict[str, float] = {}
    for step in steps:
        for phase, seconds in step["seconds_by_phase"].items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    return totals


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
