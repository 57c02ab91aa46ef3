"""The order in which data is seen: drawn at random, reproducible on any machine, and resumable at any item.

`BlendedDataset` mixes weighted sources into epochs, `PromptSampler` (prompt_sampler.py) draws prompts without end. Both
are positions in a sequence that depends on the seed alone, so a state is a few numbers and a resumed run sees what an
uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from icegrt.errors import DataError

EPOCH_STREAM, ROTATION_STREAM, PROMPT_STREAM = range(3)  # streams of one seed
Pair = tuple[int, int]


@lru_cache(maxsize=2)  # an order takes 8 bytes a row
def shuffled(n: int, seed: int, *stream: int) -> np.ndarray:
    """A permutation of n (int64, read-only) for (seed, stream). Sorts raw PCG64 words, the part of numpy's generators
    that keeps its bits between versions, unlike `Generator.permutation`: a run may resume under another numpy."""
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


class BlendedDataset:
    """Weighted sources mixed into shuffled epochs of (source index, item index).

    A source of weight w gives each of its items w times per epoch: a whole part every epoch, and for the fraction a
    window that moves through a fixed shuffle of the source, so that no item is served twice before all were once.
    """

    def __init__(self, sources: Sequence[tuple[Sequence, float]], seed: int) -> None:
        """`sources` are (items, weight). Raises `DataError` for no source, an empty one, or a weight not above 0."""
        if not sources:
            raise DataError("a blend needs at least one source")
        for index, (items, weight) in enumerate(sources):
            if not len(items):
                raise DataError(f"source {index} of the blend has no items")
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(f"source {index} of the blend: expected a weight above 0, got {weight}")
        self.sources = [items for items, _ in sources]
        # Exact fractions: 0.1 * n * epoch in floating point would lose or repeat items over many epochs.
        self.weights = [Fraction(weight).limit_denominator(1_000_000) for _, weight in sources]
        if not all(self.weights):
            raise DataError("a blend's weight is below 1e-6: leave that source out")
        self.seed = seed
        self._epoch = 0
        self._position = 0
        # Items of all sources are numbered through; source s begins at `_first[s]`.
        self._first = np.cumsum([0, *map(len, self.sources)])
        self._order: tuple[int, np.ndarray] | None = None

    def epoch(self, e: int) -> list[Pair]:
        """Epoch `e` (from 0), shuffled by (seed, e): the same list whenever it is asked for."""
        return self._pairs(self._numbers(e))

    def _numbers(self, e: int) -> np.ndarray:
        numbers = np.concatenate([self._items(s, e) + self._first[s] for s in range(len(self.sources))])
        return numbers[shuffled(numbers.size, self.seed, EPOCH_STREAM, e)]

    def _pairs(self, numbers: np.ndarray) -> list[Pair]:
        sources = np.searchsorted(self._first, numbers, side="right") - 1
        return list(zip(sources.tolist(), (numbers - self._first[sources]).tolist(), strict=True))

    def count(self, epochs: float = 1.0) -> int:
        """Items in so many passes, a part of a pass rounded to whole items."""
        whole = int(epochs)
        done = sum(self._window(source, whole)[2] for source in range(len(self.sources)))
        return done + round((epochs - whole) * self._size(whole))

    def item(self, pair: Pair) -> Any:
        """What a pair of `epoch` or `batches` stands for."""
        return self.sources[pair[0]][pair[1]]

    def batches(self, batch_size: int, epochs: float | None = None) -> Iterator[list[Pair]]:
        """Batches from the present position on, an epoch's tail joined with the next one's start.

        All are full, except the last where `epochs` (counted from the very beginning, not from the position) ends
        them. `state()` between two batches says that the first of them was consumed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        total = None if epochs is None else self.count(epochs)
        while True:
            left = batch_size if total is None else min(batch_size, total - self.consumed)
            if left < 1:
                return
            yield self._take(left)

    @property
    def consumed(self) -> int:
        """Items taken since the beginning."""
        return self.count(self._epoch) + self._position

    def state(self) -> dict[str, Any]:
        """Where the blend stands, and of what it is made, as plain numbers and strings."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises `DataError` where the data, a weight or the seed is not what it was."""
        check_identity(state, self._identity(), "the data of this run")
        self._epoch, self._position = restored_position(state)

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "sizes": [len(s) for s in self.sources], "weights": [str(w) for w in self.weights]}

    def _window(self, source: int, e: int) -> tuple[int, int, int]:
        """(whole passes per epoch, items of the fraction served before epoch e, all items served before epoch e)."""
        n, weight = len(self.sources[source]), self.weights[source]
        whole = math.floor(weight)
        served = math.ceil((weight - whole) * n * e)
        return whole, served, served + whole * n * e

    def _items(self, source: int, e: int) -> np.ndarray:
        n = len(self.sources[source])
        whole, start, _ = self._window(source, e)
        stop = self._window(source, e + 1)[1]
        items = np.tile(np.arange(n), whole)
        if start == stop:
            return items
        rotation = shuffled(n, self.seed, ROTATION_STREAM, source)
        return np.concatenate([items, rotation[np.arange(start, stop) % n]])

    def _size(self, e: int) -> int:
        return sum(self._window(s, e + 1)[2] - self._window(s, e)[2] for s in range(len(self.sources)))

    def _take(self, k: int) -> list[Pair]:
        taken: list[Pair] = []
        while len(taken) < k:
            if self._order is None or self._order[0] != self._epoch:
                self._order = (self._epoch, self._numbers(self._epoch))
            part = self._order[1][self._position : self._position + k - len(taken)]
            taken += self._pairs(part)
            self._position += len(part)
            if self._position >= len(self._order[1]):
                self._epoch, self._position = self._epoch + 1, 0
        return taken


def restored_position(state: dict[str, Any]) -> tuple[int, int]:
    return int(state["epoch"]), int(state["position"])


def check_identity(state: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    for key, value in ours.items():
        if state.get(key) != value:
            raise DataError(
                f"{what} changed since the checkpoint: {key} was {state.get(key)}, now {value}; "
                "resume with the same files, weights and seed, or start a new run"
            )
