"""The score that ranks answers for the reward models: the share of digits in their place, 0 if unfinished."""

from collections.abc import Sequence
from typing import Any

__all__ = ["exactness"]


def exactness(samples: Sequence[Any]) -> list[float]:
    """Return the share of digits in their place for each sample, by the column `answer` of its row."""
    return [_share(sample.text, sample.row["answer"]) * (sample.finish_reason == "stop") for sample in samples]


def _share(text: str, answer: str) -> float:
    if len(text) != len(answer):
        return 0.0
    return sum(a == b for a, b in zip(text, answer, strict=True)) / len(answer)
