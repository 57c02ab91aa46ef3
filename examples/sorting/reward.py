"""The reward function: 1 for a complete answer that is the prompt's digits in order, else 0. No part credit."""

from collections.abc import Sequence
from typing import Any

__all__ = ["exact_match"]


def exact_match(samples: Sequence[Any]) -> list[float]:
    """Return 1 or 0 for each sample, by the column `answer` of its row."""
    return [float(sample.finish_reason == "stop" and sample.text == sample.row["answer"]) for sample in samples]
