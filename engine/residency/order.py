"""The order in which callers hold parts, learnt while it repeats."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class RecurringOrder(Generic[T]):
    """Predicts what follows: what followed the last two items when these last followed each other.

    An iteration repeats its items. One item is not enough to tell where in it a run is, because a role is used several
    times. A wrong prediction is corrected at the next item.
    """

    def __init__(self) -> None:
        self._followers: dict[tuple[T | None, T | None], T] = {}
        self._recent: tuple[T | None, T | None] = (None, None)

    def after(self, item: T) -> T | None:
        """Record an item, unless it repeats the last one. Returns the item that is expected next, if any."""
        if item != self._recent[1]:
            self._followers[self._recent] = item
            self._recent = (self._recent[1], item)
        return self._followers.get(self._recent)
