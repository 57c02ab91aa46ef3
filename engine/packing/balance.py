"""Balance sequences over ranks and micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from icegrt import _C
from icegrt.packing.arrays import Integers, int_array, integer


@dataclass(frozen=True)
class Plan:
    """An assignment of sequences to ranks and micro-batches.

    Every rank has `n_micro_batches` micro-batches. Some may be empty; `pack` gives those a one-token tail.

    Attributes:
        assignments: `assignments[rank][micro_batch]` holds ascending sequence indices.
        tokens: `tokens[rank][micro_batch]` is the number of tokens, at most `token_budget`.
        token_budget: the limit in tokens.
    """

    assignments: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    token_budget: int

    @property
    def ranks(self) -> int:
        """Number of data-parallel ranks."""
        return len(self.assignments)

    @property
    def n_micro_batches(self) -> int:
        """Number of micro-batches per rank."""
        return len(self.assignments[0])

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(map(sum, self.tokens))

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the largest micro-batch."""
        return max(map(max, self.tokens))

    @property
    def n_empty(self) -> int:
        """Number of micro-batches without a sequence."""
        return sum(not sequences for micro_batches in self.assignments for sequences in micro_batches)

    @property
    def fill(self) -> float:
        """Used fraction of the budget: n_tokens / (ranks * n_micro_batches * token_budget)."""
        return self.n_tokens / (self.ranks * self.n_micro_batches * self.token_budget)

    @property
    def imbalance(self) -> float:
        """Largest over mean micro-batch, at least 1; 1.0 without tokens."""
        n_tokens = self.n_tokens
        return self.max_tokens * self.ranks * self.n_micro_batches / n_tokens if n_tokens else 1.0

    @property
    def waste(self) -> float:
        """Fraction of time that ranks wait for the rank with the most tokens in the same micro-batch; 0 if even."""
        max_tokens = sum(max(tokens_by_rank) for tokens_by_rank in zip(*self.tokens))
        return 1.0 - self.n_tokens / (max_tokens * self.ranks) if max_tokens else 0.0


@dataclass(frozen=True)
class Share:
    """The position of a rank among the data-parallel ranks, and the multiples that its micro-batches need.

    Attributes:
        ranks: data-parallel size.
        rank: data-parallel rank.
        round_to: the number of micro-batches is a multiple of this (see `balance`).
        tail_multiple: the tokens of a micro-batch are a multiple of this (see `pack`).
    """

    ranks: int = 1
    rank: int = 0
    round_to: int = 1
    tail_multiple: int = 1

    def assign(self, lengths: Sequence[int], token_budget: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return every rank's micro-batches of sequence indices (`Plan.assignments`)."""
        plan = balance(lengths, token_budget=token_budget, ranks=self.ranks, round_to=self.round_to)
        return plan.assignments


def balance(
    lengths: Integers,
    *,
    token_budget: int,
    ranks: int = 1,
    round_to: int = 1,
    costs: Integers | None = None,
) -> Plan:
    """Assign sequences to data-parallel ranks and micro-batches of at most `token_budget` tokens.

    Every rank gets the same number of micro-batches, a multiple of `round_to`, and as few as the heuristic finds. Then
    their sizes are balanced. The result depends on the arguments only.

    Args:
        lengths: lengths in tokens, each from 1 to `token_budget`.
        token_budget: largest micro-batch in tokens, without the alignment tail that `pack` may add.
        ranks: data-parallel size.
        round_to: the number of micro-batches per rank is a multiple of this (the pipeline-parallel size, with virtual
            pipeline stages).
        costs: integers to balance instead of the lengths, for example with the quadratic cost of attention. The budget
            still limits tokens.

    Returns:
        The plan.

    Raises:
        ValueError: a sequence is longer than the budget (the message has its index and length), a length or option is
            below 1, a cost is negative, a sum does not fit in int64, or `lengths` and `costs` differ in size.

    Shape:
        lengths, costs: (N,), integers.
    """
    length_array = int_array("lengths", lengths)
    cost_array = None if costs is None else int_array("costs", costs)
    token_budget, ranks = integer("token_budget", token_budget), integer("ranks", ranks)
    round_to = integer("round_to", round_to)
    n, order, offsets, tokens = _C.balance(length_array, cost_array, token_budget, ranks, round_to)
    sequences = order.tolist()
    micro_batches = [tuple(sequences[start:end]) for start, end in pairwise(offsets.tolist())]
    starts = range(0, ranks * n, n)
    return Plan(
        assignments=tuple(tuple(micro_batches[k : k + n]) for k in starts),
        tokens=tuple(tuple(tokens[k : k + n].tolist()) for k in starts),
        token_budget=token_budget,
    )
