"""The order in which prompts are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from icegrt.data.blend import PROMPT_STREAM, check_identity, restored_position, shuffled
from icegrt.errors import DataError


class PromptSampler:
    """Draw indices of n prompts without end: each once per epoch, every epoch shuffled by (seed, epoch)."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise DataError(f"expected at least 1 prompt to draw from, got {n}")
        self.n, self.seed = n, seed
        self._epoch = 0
        self._position = 0
        # A draw may span two epochs. `_late`: the prompts that it took from the old epoch's tail. `_head`: how many it
        # took from this epoch. In this epoch the `_late` prompts come after those `_head` prompts.
        self._late: list[int] = []
        self._head = 0

    def draw(self, k: int) -> list[int]:
        """Return the next k prompts; an epoch's tail is joined with the next epoch's start.

        No prompt occurs twice if k <= n: a prompt of the tail that the next epoch would repeat within this draw is
        moved behind the draw.
        """
        if k < 1:
            raise ValueError(f"draw at least 1 prompt, got {k}")
        drawn: list[int] = []
        while len(drawn) < k:
            part = self._order()[self._position : self._position + k - len(drawn)]
            drawn += part.tolist()
            self._position += len(part)
            if self._position == self.n:
                self._epoch, self._position = self._epoch + 1, 0
                remaining = k - len(drawn)
                self._late, self._head = (list(drawn), remaining) if remaining and k <= self.n else ([], 0)
        return drawn

    def state(self) -> dict[str, Any]:
        """Return the position and the identity of the draw, as plain numbers."""
        position = {"epoch": self._epoch, "position": self._position, "late": list(self._late), "head": self._head}
        return position | {"n": self.n, "seed": self.seed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            DataError: the number of prompts or the seed differs.
        """
        check_identity(state, {"n": self.n, "seed": self.seed}, "the prompts of this run")
        self._epoch, self._position = restored_position(state)
        self._late, self._head = list(state["late"]), int(state["head"])

    def _order(self) -> np.ndarray:
        order = shuffled(self.n, self.seed, PROMPT_STREAM, self._epoch)
        if not self._late:
            return order
        # The first `_head` prompts that are not late go first. They lie among the first `_head + len(_late)`.
        first = np.flatnonzero(~np.isin(order[: self._head + len(self._late)], self._late))[: self._head]
        return np.concatenate([order[first], np.delete(order, first)])
