"""Answers to test prompts before and after training: files, scores by prompt, gains, and examples to show."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icegrt.metrics.statistics import paired_bootstrap_ci95

__all__ = ["columns", "example_rows", "gain", "per_prompt", "read_json", "seconds_by_phase"]


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
