"""Rows of data with the place they came from, so that every later error can name a file and a line.

A source is a JSONL or Parquet file, an iterable of dicts, or a `datasets.Dataset` (anything that yields dicts). Files
are opened, not loaded: a row is read when it is asked for, so data may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Columns that are recognised as the prompt and as the answer (TRL, verl, OpenRLHF); the first name is our own.
PROMPTS = ("prompt", "input", "context_messages")
RESPONSES = ("response", "completion", "output")


@dataclass(frozen=True)
class Row:
    """One object of a source. `where` is "path:line" for JSONL (from 1), "path:row i" for Parquet (from 0), else
    "row i" (from 0, as `source[i]`)."""

    data: dict[str, Any]
    where: str

    def get(self, key: str) -> Any:
        """The column's value; None where it is absent or null (datasets fill absent columns with nulls)."""
        return self.data.get(key)

    def columns(self) -> list[str]:
        """Names of the columns that hold something."""
        return [key for key, value in self.data.items() if value is not None]


class LazyRows(Sequence):
    """Rows that are read when asked for, of so many bytes. A subclass has `__len__` and `row(i)`."""

    nbytes: float = 0

    def row(self, index: int) -> Row:
        """Row `index`, from 0."""
        raise NotImplementedError

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        return self.row(range(len(self))[index])

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


def kind(value: Any) -> str:
    """What a value is, in words for a message."""
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
