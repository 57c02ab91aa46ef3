"""Rows of data with their location, so that every later error can name a file and a line.

A source is a JSONL or Parquet file, an iterable of dicts, or a `datasets.Dataset` (anything that yields dicts). Rows of
files are read on access, so data may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Column names of the prompt and of the answer: this project's first, then those of TRL, verl and OpenRLHF.
PROMPTS = ("prompt", "input", "context_messages")
RESPONSES = ("response", "completion", "output")


@dataclass(frozen=True)
class Row:
    """One object of a source and its location.

    `where` is "path:line" for JSONL (from 1), "path:row i" for Parquet (from 0), else "row i" (from 0).
    """

    data: dict[str, Any]
    where: str

    def get(self, key: str) -> Any:
        """Return the column's value; None if it is absent or null (`datasets` fills absent columns with nulls)."""
        return self.data.get(key)

    def columns(self) -> list[str]:
        """Return the names of the columns that are not null."""
        return [key for key, value in self.data.items() if value is not None]


class LazyRows(Sequence):
    """Rows that are read on access. A subclass defines `__len__` and `row(i)`; `nbytes` is the size of all rows."""

    nbytes: float = 0

    def row(self, index: int) -> Row:
        """Return row `index`, from 0."""
        raise NotImplementedError

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        return self.row(range(len(self))[index])

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


def type_name(value: Any) -> str:
    """Return the JSON type of a value, in words for a message."""
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
