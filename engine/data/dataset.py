"""Data as the trainers hold it: checked once in one pass, then read and tokenised row by row as it is asked for.

Of large data only 12 bytes a row stay in memory (which row, how many tokens); data from small files, and data that is
in memory anyway, stays encoded.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Generic

import numpy as np

from icegrt.data.examples import CHUNK_ROWS, Encoder, Item, SkippedRow, nothing_left
from icegrt.data.rows import Row
from icegrt.utils.console import is_quiet, print_info, progress, table

HELD_BYTES = 16 << 20
_HEADERS = ("data", "rows", "tokens", "mean", "p95", "longest", "cut", "left out")


class EncodedDataset(Sequence, Generic[Item]):
    """Items of all rows that are not left out, in the rows' order; an item has a length in tokens.

    lengths: int32, tokens of each item. truncated: how many were cut. dropped: how many rows were left out, by reason.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder, name: str = "data") -> None:
        """Read and encode every row once. Raises `DataError` for the first that cannot be used, or if none is left."""
        self.name = name
        self.truncated, self.dropped = 0, Counter()
        self._rows, self._encoder = rows, encoder
        held: list | None = [] if getattr(rows, "nbytes", 0) <= HELD_BYTES else None
        places, lengths = array("q"), array("i")
        with progress(len(rows), f"reading {name}", "rows") as bar:
            for start in range(0, len(rows), CHUNK_ROWS):
                items = encoder(rows[start : start + CHUNK_ROWS])
                for place, item in enumerate(items, start):
                    if isinstance(item, SkippedRow):
                        self.dropped[item.why] += 1
                        continue
                    places.append(place)
                    lengths.append(len(item))
                    self.truncated += item.truncated
                    if held is not None:
                        held.append(item)
                bar.advance(len(items))
        if not places:
            raise nothing_left(rows[0].where, len(rows), self.reasons())
        self._held = held
        self._places = np.frombuffer(places, dtype=np.int64)
        self.lengths = np.frombuffer(lengths, dtype=np.intc)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self._many(range(*index.indices(len(self))))
        return self._many([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield from self[start : start + CHUNK_ROWS]

    def longest(self) -> Item:
        """The item of most tokens, the first of several."""
        return self[int(self.lengths.argmax())]

    def subset(self, indices: Sequence[int]) -> EncodedDataset[Item]:
        """The items at `indices`, in that order, over the same rows."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        chosen = np.asarray(indices, dtype=np.int64)
        part._places, part.lengths = self._places[chosen], self.lengths[chosen]
        part._held = None if self._held is None else [self._held[i] for i in chosen]
        return part

    def reasons(self) -> str:
        """Why rows were left out: `3 longer than 512 tokens`; empty where none was."""
        return ", ".join(f"{count:,} {why}" for why, count in self.dropped.most_common())

    def _many(self, indices: Sequence[int]) -> list[Item]:
        if self._held is not None:
            return [self._held[i] for i in indices]
        return self._encoder([self._rows[int(self._places[i])] for i in indices])


class ConcatDataset(Sequence, Generic[Item]):
    """Several `EncodedDataset` end to end. lengths: int32, tokens of each item."""

    def __init__(self, parts: Sequence[EncodedDataset[Item]]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self.lengths = np.concatenate([np.zeros(0, np.intc), *(part.lengths for part in self._parts)])

    def __len__(self) -> int:
        return self.lengths.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number][index - (int(self._ends[number - 1]) if number else 0)]


def report_lengths(data: Sequence[EncodedDataset]) -> None:
    """Print what training is about to see: rows, tokens and lengths of each source, and what was cut or left out."""
    if is_quiet() or not data:
        return
    table(_HEADERS, [_summary(part) for part in data])
    for part in data:
        if part.dropped:
            print_info(f"{part.name}: left out {part.reasons()}")


def _summary(part: EncodedDataset) -> list[str]:
    lengths = part.lengths
    figures = (len(part), lengths.sum(dtype=np.int64), lengths.mean(), np.percentile(lengths, 95), lengths.max())
    counts = (part.truncated, part.dropped.total())
    return [part.name, *(f"{round(float(x)):,}" for x in (*figures, *counts))]
