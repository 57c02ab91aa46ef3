"""Training data as the stages hold it: every source opened, checked and reported before training; packed when read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from icegrt.config import DataSource
from icegrt.data import ConcatDataset, EncodedDataset, open_rows, report_lengths
from icegrt.data.blend import shuffled
from icegrt.data.examples import Encoder
from icegrt.data.types import Rows
from icegrt.packing import Share

_HELD_TOKENS = 2_000_000


def encode_sources(
    key: str, files: Sequence[DataSource], given: Rows | None, encoder: Encoder
) -> list[tuple[EncodedDataset, float]]:
    """`given` (rows from Python, or a path) or else `files`, each with its weight, every row read once; `key` names
    rows from Python. Raises `DataError` naming file and line."""
    sources = [(DataSource(), given)] if given is not None else [(source, source.path) for source in files]
    encoded = []
    for source, rows in sources:
        opened = open_rows(rows, input_key=source.input_key, output_key=source.output_key)
        name = str(rows) if isinstance(rows, (str, Path)) else key
        encoded.append((EncodedDataset(opened, encoder, name), source.weight))
    report_lengths([data for data, _ in encoded])
    return encoded


def hold_out(
    sources: Sequence[tuple[EncodedDataset, float]], fraction: float, seed: int
) -> tuple[list[tuple[EncodedDataset, float]], list[EncodedDataset]]:
    """`fraction` of every source's items, at least one, drawn by `seed` and set apart: (what is left, what is held
    out). An item is a row, so all responses to a prompt are on one side."""
    left, held = [], []
    for index, (items, weight) in enumerate(sources):
        order = shuffled(len(items), seed, index)
        count = min(max(1, round(fraction * len(items))), len(items) - 1)
        held.append(items.subset(np.sort(order[:count])))
        left.append((items.subset(np.sort(order[count:])), weight))
    return left, held


class LazyMicroBatches(Sequence):
    """Micro-batches of at most `token_budget` tokens over many items, each packed when it is asked for."""

    def __init__(self, items: ConcatDataset, token_budget: int, pack_group: Callable[..., Any], share: Share) -> None:
        self._items, self._pack = items, partial(pack_group, tail_multiple=share.tail_multiple)
        self._groups = share.assign(items.lengths.tolist(), token_budget)[share.rank]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._pack([self._items[i] for i in self._groups[index]])


def packed(
    items: ConcatDataset, token_budget: int, pack_group: Callable[..., Any], share: Share | None = None
) -> Sequence:
    """This rank's share of the items (None: all) as micro-batches: in memory where they are few, else packed when read;
    empty where there are none. `pack_group(items, tail_multiple=...)` makes one."""
    if not len(items):
        return []
    batches = LazyMicroBatches(items, token_budget, pack_group, share or Share())
    return list(batches) if items.lengths.sum(dtype="int64") <= _HELD_TOKENS else batches
