"""Sums and differences of two or three digits, made by reasoning-gym (task `chain_sum`), in parts without overlap.

There are only 200 problems of two digits, so training repeats some of them. A checksum of the expression assigns a
problem to its part: no expression of a held-out part occurs in training, in whatever order problems are drawn.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["PARTS", "Sizes", "build_rows", "part_of"]

PARTS = ("train", "validation", "test")
TERMS = (2, 3)
DRAWS = 100_000  # per number of terms; far more than the parts need


@dataclass(frozen=True)
class Sizes:
    """Rows of each part, half of them with each number of terms."""

    train: int = 4096
    validation: int = 32
    test: int = 128


def part_of(expression: str) -> str:
    """Return the part of a problem: half of all are for training, a tenth for validation, the rest for the test."""
    place = zlib.crc32(expression.encode()) % 10
    return "train" if place < 5 else "validation" if place < 6 else "test"


def build_rows(sizes: Sizes, seed: int) -> dict[str, list[dict]]:
    """Return the rows of each part, with the columns prompt, answer, expression and terms.

    Rows with two and with three terms alternate. Held-out rows are distinct; training rows may repeat.
    """
    problems = {terms: draw_problems(terms, seed) for terms in TERMS}
    rows: dict[str, list[dict]] = {}
    for part in PARTS:
        by_terms = [take(problems[terms], part, getattr(sizes, part) // len(TERMS)) for terms in TERMS]
        rows[part] = [row for pair in zip(*by_terms, strict=True) for row in pair]
    return rows


def draw_problems(terms: int, seed: int) -> Iterator[dict]:
    """Yield `DRAWS` problems with this number of terms, each from 0 to 9."""
    import reasoning_gym

    # reasoning-gym draws item n of a seed from `seed + n`: adjacent seeds would give the same items, shifted by one.
    dataset = reasoning_gym.create_dataset(
        "chain_sum", min_terms=terms, max_terms=terms, min_digits=1, max_digits=1, size=DRAWS, seed=seed * DRAWS
    )
    for item in dataset:
        expression = item["metadata"]["expression"].strip()
        yield {"prompt": item["question"], "answer": item["answer"], "expression": expression, "terms": terms}


def take(problems: Iterator[dict], part: str, count: int) -> list[dict]:
    """Return the next `count` problems of a part, distinct if the part is held out.

    Raises:
        ValueError: the part has fewer problems.
    """
    rows: list[dict] = []
    seen: set[str] = set()
    for row in problems:
        if part_of(row["expression"]) == part and (part == "train" or row["expression"] not in seen):
            seen.add(row["expression"])
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(f"sizes.{part}: expected at most {len(rows)} problems with one number of terms, got {count}")
