"""The statistics of a reward model's scores, saved beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from icegrt.errors import CheckpointError
from icegrt.utils.files import read_object

SCORE_STATISTICS = "score_statistics.json"


def saved_statistics(reward_model: Any) -> dict[str, float] | None:
    """Count, mean and std of the scores that a reward model's checkpoint says it gives; None where it does not say."""
    path = Path(reward_model) / SCORE_STATISTICS if isinstance(reward_model, (str, Path)) else None
    if path is None or not path.is_file():
        return None
    found = read_object(path).get("after")
    if not isinstance(found, dict) or not all(isinstance(found.get(k), (int, float)) for k in ("count", "mean", "std")):
        raise CheckpointError(
            f"{path}: expected `after` with count, mean and std; remove the file to start without them"
        )
    return found


def score_statistics(score_N: torch.Tensor) -> dict[str, float]:
    """Count, mean and (population) standard deviation of raw scores, by which PPO normalises them."""
    score_N = score_N.double()
    return {"count": score_N.numel(), "mean": float(score_N.mean()), "std": float(score_N.std(correction=0))}
