"""Balance sequences over ranks and micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from icegrt import _C
from icegrt.packing.arrays import int_array, integer


@dataclass(frozen=True)
class Plan:
    """Which sequence goes where: `assignments[rank][micro_batch]` holds ascending sequence indices.

    Every rank has `n_micro_batches` micro-batches; some may be empty (`pack` gives those a one-token tail). `tokens`
    has the same shape as `assignments` and holds the tokens of each micro-batch, none above `token_budget`.
    """

    assignments: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    token_budget: int

    @property
    def ranks(self) -> int:
        """Ranks that share the sequences."""
        return len(self.assignments)

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches per rank."""
        return len(self.assignments[0])

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(sum, self.tokens))

    @property
    def max_tokens(self) -> int:
        """Tokens of the fullest micro-batch."""
        return max(map(max, self.tokens))

    @property
    def n_empty(self) -> int:
        """Micro-batches without a sequence."""
        return sum(not members for rank in self.assignments for members in rank)

    @property
    def fill(self) -> float:
        """Share of the budget in use: tokens over micro-batches times `token_budget`."""
        return self.n_tokens / (self.ranks * self.n_micro_batches * self.token_budget)

    @property
    def imbalance(self) -> float:
        """Fullest micro-batch over the mean one, >= 1; 1.0 for a plan without tokens."""
        n_tokens = self.n_tokens
        return self.max_tokens * self.ranks * self.n_micro_batches / n_tokens if n_tokens else 1.0

    @property
    def waste(self) -> float:
        """Share of lock-step time in which a rank waits for the fullest one of the same micro-batch, 0 when even."""
        slowest = sum(max(column) for column in zip(*self.tokens))
        return 1.0 - self.n_tokens / (slowest * self.ranks) if slowest else 0.0


@dataclass(frozen=True)
class Share:
    """What of a plan falls to one rank: its place among the data-parallel ranks, and how its micro-batches are cut.

    round_to: micro-batches come in multiples of this; tail_multiple: their tokens do (see `balance` and `pack`).
    """

    ranks: int = 1
    rank: int = 0
    round_to: int = 1
    tail_multiple: int = 1

    def assign(self, lengths: Sequence[int], token_budget: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Every rank's micro-batches of sequence indices (`Plan.assignments`)."""
        plan = balance(lengths, token_budget=token_budget, ranks=self.ranks, round_to=self.round_to)
        return plan.assignments


def balance(
    lengths: Sequence[int] | np.ndarray | Tensor,
    *,
    token_budget: int,
    ranks: int = 1,
    round_to: int = 1,
    costs: Sequence[int] | np.ndarray | Tensor | None = None,
) -> Plan:
    """Shares sequences out over data-parallel ranks and micro-batches of at most `token_budget` tokens.

    Every rank gets the same number of micro-batches, a multiple of `round_to` and as few as the placement finds; their
    sizes are then evened out. The result depends on the arguments only.

    Args:
        lengths: N lengths in tokens, each from 1 to `token_budget`.
        token_budget: most tokens in one micro-batch. An alignment tail added by `pack` is not part of it: leave room.
        ranks: data-parallel size.
        round_to: micro-batches per rank are a multiple of this (the pipeline size under virtual pipeline parallelism).
        costs: N integers to even out instead of the lengths, for example with attention's quadratic share. The budget
            is still about tokens.

    Raises:
        ValueError: a sequence is longer than the budget (its index and length are named), a length or option is below
            1, a cost is negative, a sum does not fit in int64, or `lengths` and `costs` differ in size.
    """
    length_array = int_array("lengths", lengths)
    cost_array = None if costs is None else int_array("costs", costs)
    token_budget, ranks = integer("token_budget", token_budget), integer("ranks", ranks)
    round_to = integer("round_to", round_to)
    n, order, offsets, tokens = _C.balance(length_array, cost_array, token_budget, ranks, round_to)
    flat, ends = order.tolist(), offsets.tolist()
    bins = [tuple(flat[a:b]) for a, b in pairwise(ends)]
    starts = range(0, ranks * n, n)
    return Plan(
        assignments=tuple(tuple(bins[k : k + n]) for k in starts),
        tokens=tuple(tuple(tokens[k : k + n].tolist()) for k in starts),
        token_budget=token_budget,
    )
