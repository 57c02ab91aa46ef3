"""The reward function that the engine calls: one checker score in [0, 1] per sample."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The engine loads this file by its path: the demo's folder need not be a package on the path already.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ad_moderation.checker import check


def checker_reward(samples: Sequence[Any]) -> list[float]:
    """Grades samples with attributes `text`, `finish_reason` ("stop" or "length"), `row` and `messages`.

    `row` is the data row with the truth columns; a row without them is graded by what the detectors find in its prompt.
    """
    return [check(sample.row, sample.text, sample.finish_reason == "length").score for sample in samples]
