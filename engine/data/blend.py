"""The order of the training data: random, reproducible on any machine, resumable at any item.

`BlendedDataset` mixes weighted sources into epochs. `PromptSampler` (prompt_sampler.py) draws prompts without end. The
order of either depends only on the seed, the sizes and the weights. The state is therefore a position in that order, a
few numbers, and a resumed run continues the order of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from icegrt.errors import DataError

EPOCH_STREAM, ROTATION_STREAM, PROMPT_STREAM = range(3)  # random streams of one seed
Pair = tuple[int, int]


@lru_cache(maxsize=2)  # an order takes 8 bytes a row
def shuffled(n: int, seed: int, *stream: int) -> np.ndarray:
    """Return a permutation of n (int64, read-only) for (seed, stream)."""
    # numpy 2: `Generator.permutation` may change its values between versions, raw PCG64 words may not. We sort the
    # words, so that a run can resume under another numpy.
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


class BlendedDataset:
    """Mix weighted sources into shuffled epochs of (source index, item index).

    A source of n items and weight w contributes w * n items to an epoch, up to rounding. The integer part of w repeats
    every item that many times in every epoch. The fraction adds a part of the items. Epoch by epoch that part moves
    through a fixed shuffle of the source, so that no item is added again before all items were added.

    Example: weight 2.5 and 4 items. Every epoch has each item twice, and two of the items once more; the next epoch
    adds the other two.
    """

    def __init__(self, sources: Sequence[tuple[Sequence, float]], seed: int) -> None:
        """Take (items, weight) of each source.

        Raises:
            DataError: no source, an empty source, or a weight that is not above 0.
        """
        if not sources:
            raise DataError("a blend needs at least one source")
        for index, (items, weight) in enumerate(sources):
            if not len(items):
                raise DataError(f"source {index} of the blend has no items")
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(f"source {index} of the blend: expected a weight above 0, got {weight}")
        self.sources = [items for items, _ in sources]
        # Exact fractions: floating-point products 0.1 * n * epoch would lose or repeat items over many epochs.
        self.weights = [Fraction(weight).limit_denominator(1_000_000) for _, weight in sources]
        if not all(self.weights):
            raise DataError("a blend's weight is below 1e-6: remove that source")
        self.seed = seed
        self._epoch = 0
        self._position = 0
        # A blend id numbers the items of all sources; those of source s begin at `_first_id[s]`.
        self._first_id = np.cumsum([0, *map(len, self.sources)])
        self._order: tuple[int, np.ndarray] | None = None

    def epoch(self, e: int) -> list[Pair]:
        """Return the pairs of epoch `e` (from 0), shuffled by (seed, e)."""
        return self._pairs(self._epoch_ids(e))

    def _epoch_ids(self, e: int) -> np.ndarray:
        ids = np.concatenate([self._source_items(s, e) + self._first_id[s] for s in range(len(self.sources))])
        return ids[shuffled(ids.size, self.seed, EPOCH_STREAM, e)]

    def _pairs(self, ids: np.ndarray) -> list[Pair]:
        sources = np.searchsorted(self._first_id, ids, side="right") - 1
        return list(zip(sources.tolist(), (ids - self._first_id[sources]).tolist(), strict=True))

    def count(self, epochs: float = 1.0) -> int:
        """Return the number of items in `epochs` epochs; the last, partial epoch is rounded to items."""
        full_epochs = int(epochs)
        items = sum(self._window(source, full_epochs)[2] for source in range(len(self.sources)))
        return items + round((epochs - full_epochs) * self._size(full_epochs))

    def item(self, pair: Pair) -> Any:
        """Return the item of a pair of `epoch` or `batches`."""
        return self.sources[pair[0]][pair[1]]

    def batches(self, batch_size: int, epochs: float | None = None) -> Iterator[list[Pair]]:
        """Yield batches from the current position on; an epoch's tail is joined with the next epoch's start.

        `epochs` counts from the beginning of training, not from the position. Only the last batch may be smaller.
        `state()` between two batches counts the first of them as consumed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        total = None if epochs is None else self.count(epochs)
        while True:
            size = batch_size if total is None else min(batch_size, total - self.consumed)
            if size < 1:
                return
            yield self._take(size)

    @property
    def consumed(self) -> int:
        """Items taken since the beginning of training."""
        return self.count(self._epoch) + self._position

    def state(self) -> dict[str, Any]:
        """Return the position and the identity of the blend, as plain numbers and strings."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            DataError: the data, a weight or the seed differs.
        """
        check_identity(state, self._identity(), "the data of this run")
        self._epoch, self._position = restored_position(state)

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "sizes": [len(s) for s in self.sources], "weights": [str(w) for w in self.weights]}

    def _window(self, source: int, e: int) -> tuple[int, int, int]:
        """Return (complete passes per epoch, items of the fraction before epoch e, all items before epoch e)."""
        n, weight = len(self.sources[source]), self.weights[source]
        passes = math.floor(weight)
        fraction_items = math.ceil((weight - passes) * n * e)
        return passes, fraction_items, fraction_items + passes * n * e

    def _source_items(self, source: int, e: int) -> np.ndarray:
        n = len(self.sources[source])
        passes, start, _ = self._window(source, e)
        stop = self._window(source, e + 1)[1]
        items = np.tile(np.arange(n), passes)
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
                self._order = (self._epoch, self._epoch_ids(self._epoch))
            ids = self._order[1][self._position : self._position + k - len(taken)]
            taken += self._pairs(ids)
            self._position += len(ids)
            if self._position >= len(self._order[1]):
                self._epoch, self._position = self._epoch + 1, 0
        return taken


def restored_position(state: dict[str, Any]) -> tuple[int, int]:
    """Return (epoch, position) of a state."""
    return int(state["epoch"]), int(state["position"])


def check_identity(state: dict[str, Any], identity: dict[str, Any], name: str) -> None:
    """Check that a state was saved over the same data.

    Raises:
        DataError: an entry of `identity` differs in `state`.
    """
    for key, value in identity.items():
        if state.get(key) != value:
            raise DataError(
                f"{name} changed since the checkpoint: {key} was {state.get(key)}, now {value}; "
                "resume with the same files, weights and seed, or start a new run"
            )
