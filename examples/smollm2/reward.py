"""The reward function: 1 for a complete answer whose last number is the result, else 0.

The form of the answer is free. "7", "The answer is 7." and "3 + 4 = 7" are equally good; a truncated answer is wrong,
since its last number may be followed by others.
"""

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["correct", "last_number"]

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?![\w]|\.\d)")


def last_number(text: str) -> int | None:
    """Return the last whole number of a text; None without one. A minus directly before its digits belongs to it."""
    numbers = _NUMBER.findall(text)
    return int(numbers[-1]) if numbers else None


def correct(samples: Sequence[Any]) -> list[float]:
    """Return 1 or 0 for each sample, by the column `answer` of its row."""
    return [
        float(sample.finish_reason == "stop" and last_number(sample.text) == int(sample.row["answer"]))
        for sample in samples
    ]
