"""The reward function of the demo: one checker score in [0, 1] per sample."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# icegrt loads this file by its path, so its package may not be importable yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ad_moderation.checker import check


def checker_reward(samples: Sequence[Any]) -> list[float]:
    """Return the checker's score of each sample.

    `row` is the data row with the truth columns. Without them the truth is computed from the row's prompt.
    """
    return [check(sample.row, sample.text, sample.finish_reason == "length").score for sample in samples]
