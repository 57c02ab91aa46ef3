"""Statistics of a reward model's scores, saved beside its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from icegrt.errors import CheckpointError
from icegrt.utils.files import model_folder, read_object

SCORE_STATISTICS = "score_statistics.json"


def saved_statistics(reward_model: Any) -> dict[str, float] | None:
    """Return count, mean and std of a reward model's scores from its folder; None if they are not saved.

    Args:
        reward_model: path of a Hugging Face folder or of a run; a model in memory has no statistics.

    Raises:
        CheckpointError: the file is not valid.
    """
    path = model_folder(reward_model) / SCORE_STATISTICS if isinstance(reward_model, (str, Path)) else None
    if path is None or not path.is_file():
        return None
    statistics = read_object(path).get("after")
    if not isinstance(statistics, dict) or not all(_is_finite(statistics.get(k)) for k in ("count", "mean", "std")):
        raise CheckpointError(
            f"{path}: expected `after` with finite count, mean and std; remove the file to start without them"
        )
    return statistics


def _is_finite(number: Any) -> bool:
    # Compared, not converted: JSON also holds integers that no float does.
    return isinstance(number, (int, float)) and abs(number) <= sys.float_info.max


def score_statistics(score_N: torch.Tensor) -> dict[str, float]:
    """Return count, mean and population standard deviation of raw scores, [N]. PPO normalises scores by them."""
    score_N = score_N.double()
    return {"count": score_N.numel(), "mean": float(score_N.mean()), "std": float(score_N.std(correction=0))}
