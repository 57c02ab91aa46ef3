"""The order in which prompts are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from icegrt.data.blend import PROMPT_STREAM, check_identity, restored_position, shuffled
from icegrt.errors import DataError


class PromptSampler:
    """An endless draw of n prompts: each once per epoch, every epoch shuffled by (seed, epoch)."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise DataError(f"expected at least 1 prompt to draw from, got {n}")
        self.n, self.seed = n, seed
        self._epoch = 0
        self._position = 0
        # Prompts of the draw that ran into this epoch, and how many of this epoch's it took: they come after those.
        self._late: list[int] = []
        self._head = 0

    def draw(self, k: int) -> list[int]:
        """The next k prompts, an epoch's tail joined with the next one's start; none comes twice if k <= n.

        A prompt of the tail that the next epoch would bring at once is moved behind this draw, within its epoch.
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
                left = k - len(drawn)
                self._late, self._head = (list(drawn), left) if left and k <= self.n else ([], 0)
        return drawn

    def state(self) -> dict[str, Any]:
        """Where the draw stands, as plain numbers."""
        place = {"epoch": self._epoch, "position": self._position, "late": list(self._late), "head": self._head}
        return place | {"n": self.n, "seed": self.seed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises `DataError` where the number of prompts or the seed is not what it was."""
        check_identity(state, {"n": self.n, "seed": self.seed}, "the prompts of this run")
        self._epoch, self._position = restored_position(state)
        self._late, self._head = list(state["late"]), int(state["head"])

    def _order(self) -> np.ndarray:
        order = shuffled(self.n, self.seed, PROMPT_STREAM, self._epoch)
        if not self._late:
            return order
        # The first `_head` that are not late, then all others: found at the order's beginning.
        places = np.flatnonzero(~np.isin(order[: self._head + len(self._late)], self._late))[: self._head]
        return np.concatenate([order[places], np.delete(order, places)])
