"""Answers to test prompts before and after training: files, scores by prompt, gains, and examples to show."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icegrt.metrics.statistics import distinct_fraction, paired_bootstrap_ci95

__all__ = [
    "answer_figures",
    "columns",
    "example_rows",
    "gain",
    "greedy_examples",
    "per_prompt",
    "read_json",
    "run_figures",
    "score_gains",
]


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
