"""Live storages by category, their peak, and what was alive then.

A storage counts from the operator that allocates it until its last tensor is gone. Its category is known at the end
alone: an activation is a tensor of a forward pass that a backward pass frees. So every event is kept, and `peak` walks
through them.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from icegrt.rehearsal.sites import Site

PARAMETERS, GRADIENTS, OPTIMIZER, KV_CACHE = "parameters", "gradients", "optimizer state", "KV cache"
LOGITS, ACTIVATIONS, TEMPORARY = "logits chunk", "activations", "temporary"
OFFLOADED = "offloaded state"  # on the host
CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, KV_CACHE, OFFLOADED, TEMPORARY)


@dataclass(slots=True)
class Block:
    """One storage.

    Attributes:
        bytes: as the allocator rounds them.
        category: of `CATEGORIES`; TEMPORARY until something better is known.
        site: the line that allocated it.
        is_saved: allocated in a forward pass with gradients, so that a backward may free it.
    """

    bytes: int
    category: str
    site: Site
    is_saved: bool


@dataclass(frozen=True)
class Peak:
    """The largest sum of live storages.

    Attributes:
        bytes: the sum.
        by_category: its parts.
        largest: the blocks that were alive, largest first.
    """

    bytes: int
    by_category: dict[str, int]
    largest: list[Block]


class Ledger:
    """The storages of one device.

    Args:
        rounding: bytes that every storage is rounded up to a multiple of (512: CUDA's caching allocator).
    """

    def __init__(self, rounding: int = 1) -> None:
        self._rounding = rounding
        self._live: dict[int, int] = {}  # storage -> block
        self._released: dict[int, int] = {}  # storage without memory -> block
        self._blocks: list[Block] = []
        # Block + 1 where it is allocated, its negative where it is freed.
        self._events = array("q")
        self._totals = array("q")  # bytes after each event
        self.bytes = 0

    def add(
        self, storage: torch.UntypedStorage, site: Callable[[], Site], is_saved: bool, in_backward: Callable[[], bool]
    ) -> Block | None:
        """Count a storage unless it is counted already. Returns its block if it is new."""
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return None
        size = -(-storage.nbytes() // self._rounding) * self._rounding
        number = self._append(Block(size, TEMPORARY, site(), is_saved))
        self._live[key] = number
        weakref.finalize(storage, self._free, key, number, in_backward).atexit = False
        return self._blocks[number]

    def reserve(self, size: int, category: str, site: Site) -> None:
        """Count memory that no tensor of the rehearsal has, until its end."""
        self._append(Block(size, category, site, False))

    def release(self, storage: torch.UntypedStorage) -> None:
        """Count the memory of a storage as free; the storage stays."""
        number = self._live.pop(storage._cdata)
        self._released[storage._cdata] = number
        self._events.append(-number - 1)
        self.bytes -= self._blocks[number].bytes
        self._totals.append(self.bytes)

    def restore(self, storage: torch.UntypedStorage) -> None:
        """Count the memory of a released storage again."""
        number = self._live[storage._cdata] = self._released.pop(storage._cdata)
        self._events.append(number + 1)
        self.bytes += self._blocks[number].bytes
        self._totals.append(self.bytes)

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """Set the category of a tensor's storage."""
        key = tensor.untyped_storage()._cdata
        number = self._live.get(key, self._released.get(key))
        if number is not None:
            self._blocks[number].category = category

    def mark(self) -> int:
        """Return the present moment, for `peak`."""
        return len(self._events)

    def allocations(self, start: int = 0, stop: int | None = None) -> int:
        """Return the number of storages that were allocated between two moments."""
        return sum(event > 0 for event in self._events[start:stop])

    def peak(self, start: int = 0, stop: int | None = None) -> Peak:
        """Return the peak between two moments; what was alive at `start` counts."""
        totals = self._totals_of(start, stop)
        highest = max(totals)
        moment = start + totals.index(highest)
        alive: set[int] = set()
        for event in self._events[:moment]:
            if event > 0:
                alive.add(event - 1)
            else:
                alive.discard(-event - 1)
        blocks = sorted((self._blocks[number] for number in alive), key=lambda block: -block.bytes)
        by_category = dict.fromkeys(CATEGORIES, 0)
        for block in blocks:
            by_category[block.category] += block.bytes
        return Peak(highest, by_category, blocks)

    def largest_peak(self, spans: Iterable[tuple[int, int]]) -> Peak:
        """Return the largest of the peaks of several spans."""
        return self.peak(*max(spans, key=lambda span: max(self._totals_of(*span))))

    def _totals_of(self, start: int, stop: int | None) -> list[int]:
        """Return the bytes after each event of a span, those at its start first."""
        return [self._totals[start - 1] if start else 0, *self._totals[start:stop]]

    def _append(self, block: Block) -> int:
        """Count a new block as alive. Returns its number."""
        self._blocks.append(block)
        self._events.append(len(self._blocks))
        self.bytes += block.bytes
        self._totals.append(self.bytes)
        return len(self._blocks) - 1

    def _free(self, key: int, number: int, in_backward: Callable[[], bool]) -> None:
        if self._released.get(key) == number:
            del self._released[key]
        if self._live.get(key) != number:
            return
        del self._live[key]
        block = self._blocks[number]
        self._events.append(-number - 1)
        self.bytes -= block.bytes
        self._totals.append(self.bytes)
        if block.is_saved and block.category == TEMPORARY and in_backward():
            block.category = ACTIVATIONS
