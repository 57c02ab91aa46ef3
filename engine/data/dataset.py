"""Tokenized data for the trainers: one pass checks every row, later accesses read and tokenize row by row.

Large data keeps 12 bytes a row in memory (row index, token count). Items of small files, and of data that is in memory
already, are cached.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Generic

import numpy as np

from icegrt.data.examples import CHUNK_ROWS, Encoder, Item, SkippedRow, all_rows_dropped
from icegrt.data.rows import Row
from icegrt.utils.console import is_quiet, print_info, progress, table

CACHED_BYTES = 16 << 20  # sources up to this size keep their items in memory
_HEADERS = ("data", "rows", "tokens", "mean", "p95", "longest", "truncated", "dropped")


class EncodedDataset(Sequence, Generic[Item]):
    """The items of all rows that are not dropped, in the order of the rows; `len(item)` is its number of tokens.

    lengths: int32, tokens of each item. truncated: number of truncated items. dropped: number of dropped rows, by
    reason.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder, name: str = "data") -> None:
        """Read and encode every row once.

        Raises:
            DataError: a row cannot be used, or all rows are dropped.
        """
        self.name = name
        self.truncated, self.dropped = 0, Counter()
        self._rows, self._encoder = rows, encoder
        cache: list | None = [] if getattr(rows, "nbytes", 0) <= CACHED_BYTES else None
        row_indices, lengths = array("q"), array("i")
        with progress(len(rows), f"reading {name}", "rows") as bar:
            for start in range(0, len(rows), CHUNK_ROWS):
                items = encoder(rows[start : start + CHUNK_ROWS])
                for row_index, item in enumerate(items, start):
                    if isinstance(item, SkippedRow):
                        self.dropped[item.reason] += 1
                        continue
                    row_indices.append(row_index)
                    lengths.append(len(item))
                    self.truncated += item.truncated
                    if cache is not None:
                        cache.append(item)
                bar.advance(len(items))
        if not row_indices:
            raise all_rows_dropped(rows[0].where, len(rows), self.reasons())
        self._cache = cache
        self._row_indices = np.frombuffer(row_indices, dtype=np.int64)
        self.lengths = np.frombuffer(lengths, dtype=np.intc)

    def __len__(self) -> int:
        return len(self._row_indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self._items(range(*index.indices(len(self))))
        return self._items([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield from self[start : start + CHUNK_ROWS]

    @property
    def is_cached(self) -> bool:
        """Whether all items are in memory."""
        return self._cache is not None

    def longest(self) -> Item:
        """Return the item with the most tokens, the first of several."""
        return self[int(self.lengths.argmax())]

    def subset(self, indices: Sequence[int]) -> EncodedDataset[Item]:
        """Return a dataset of the items at `indices`, in that order, over the same rows."""
        subset = object.__new__(type(self))
        subset.__dict__.update(self.__dict__)
        selected = np.asarray(indices, dtype=np.int64)
        subset._row_indices, subset.lengths = self._row_indices[selected], self.lengths[selected]
        subset._cache = None if self._cache is None else [self._cache[i] for i in selected]
        return subset

    def reasons(self) -> str:
        """Return why rows were dropped: `3 longer than 512 tokens`; empty if none was."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())

    def _items(self, indices: Sequence[int]) -> list[Item]:
        if self._cache is not None:
            return [self._cache[i] for i in indices]
        return self._encoder([self._rows[int(self._row_indices[i])] for i in indices])


class ConcatDataset(Sequence, Generic[Item]):
    """Several `EncodedDataset`s end to end. lengths: int32, tokens of each item."""

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
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]


def report_lengths(datasets: Sequence[EncodedDataset]) -> None:
    """Print a table of rows, tokens, lengths, truncated items and dropped rows of each dataset."""
    if is_quiet() or not datasets:
        return
    table(_HEADERS, [_summary(dataset) for dataset in datasets])
    for dataset in datasets:
        if dataset.dropped:
            print_info(f"{dataset.name}: dropped {dataset.reasons()}")


def _summary(dataset: EncodedDataset) -> list[str]:
    lengths = dataset.lengths
    figures = (len(dataset), lengths.sum(dtype=np.int64), lengths.mean(), np.percentile(lengths, 95), lengths.max())
    counts = (dataset.truncated, dataset.dropped.total())
    return [dataset.name, *(f"{round(float(x)):,}" for x in (*figures, *counts))]
