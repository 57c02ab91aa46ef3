"""Which rank takes which response, in which micro-batch and minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from icegrt.distributed.cluster import Cluster
from icegrt.kernels.common.streams import turn_starts
from icegrt.packing import PackedBatch, Share, balance, pack
from icegrt.rollout.types import Response

MinibatchBy = Literal["response", "prompt"]
_LOW_32_BITS, _LOW_64_BITS = 2**32 - 1, 2**64 - 1
_ODD_MULTIPLIER = 0x9E3779B1  # 2^32 over the golden ratio (Knuth, The Art of Computer Programming 3, 6.4)


@dataclass(frozen=True, eq=False)
class ActionBatch(PackedBatch):
    """A micro-batch and the per-action tensors that its loss reads, [A] float32 each; None: not read.

    `positive_index_P` has the entries of the action stream that belong to right responses, int64, and `positive_scale`
    turns the sum of their losses into what their mean contributes before the division by the step's counted actions.
    `left_actions`: actions that count beside those of the batch, with a loss of 0 (`ppo.policy_rows`); None: no
    response left the pass.

    `value_mask_A` is bool, the actions that have a return; None: all that count. `n_returns` is their number.

    `to(device)` moves all of them together.
    """

    old_logprob_A: Tensor | None = None
    ref_logprob_A: Tensor | None = None
    advantage_A: Tensor | None = None
    old_value_A: Tensor | None = None
    return_A: Tensor | None = None
    weight_A: Tensor | None = None
    positive_index_P: Tensor | None = None
    positive_scale: float = 0.0
    left_actions: int | None = None
    value_mask_A: Tensor | None = None
    n_returns: int = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # On the host: reading it later waits for no device.
        self._set("n_returns", self.n_counted_actions if self.value_mask_A is None else int(self.value_mask_A.sum()))


def truncated_mask(responses: Sequence[Response]) -> Tensor:
    """Return [N] bool: which responses reached the length limit without EOS."""
    return torch.tensor([r.truncated for r in responses], dtype=torch.bool)


@dataclass(frozen=True)
class BatchPlan:
    """All responses of an iteration, and the micro-batches of this data-parallel rank.

    Attributes:
        responses: of all ranks, in the order of sampling.
        rank_assignment: for each rank, the indices of its responses in plan order (the concatenation of its
            micro-batches).
        rank: this data-parallel rank.
        batches: this rank's micro-batches, on the CPU.
        minibatches: for each optimizer step, the indices of its micro-batches; every rank has as many.
        cluster: for the collectives; None in one process.
    """

    responses: list[Response]
    rank_assignment: list[list[int]]
    rank: int
    batches: list[PackedBatch]
    minibatches: list[list[int]]
    cluster: Cluster | None = None

    @property
    def local_responses(self) -> list[Response]:
        """This rank's responses in plan order."""
        return [self.responses[n] for n in self.rank_assignment[self.rank]]

    @property
    def truncated_N(self) -> Tensor:
        """Which of this rank's responses reached the length limit, [N] bool in plan order."""
        return truncated_mask(self.local_responses)

    @property
    def n_tokens(self) -> int:
        """Tokens of this rank's micro-batches, alignment tails included."""
        return sum(b.n_tokens for b in self.batches)

    @property
    def tail_tokens(self) -> int:
        """Alignment tails of this rank's micro-batches."""
        return sum(b.tail_tokens for b in self.batches)

    def action_batches(self, members: Sequence[int], **streams_A: Tensor) -> list[ActionBatch]:
        """Return the micro-batches `members`, each with its part of tensors over this rank's whole action stream.

        Args:
            members: indices into `batches`.
            streams_A: fields of `ActionBatch` by name, [A] over all of `batches`.
        """
        parts = {name: self._split_A(x_A) for name, x_A in streams_A.items()}
        return [
            self.batches[i].extended(ActionBatch, **{name: part[i] for name, part in parts.items()}) for i in members
        ]

    def micro_batch(self, index: int) -> BatchPlan:
        """Return the plan of one of this rank's micro-batches alone, without collectives."""
        start, batch = sum(b.n_sequences for b in self.batches[:index]), self.batches[index]
        responses = self.local_responses[start : start + batch.n_sequences]
        return BatchPlan(responses, [list(range(batch.n_sequences))], 0, [batch], [[0]])

    def _split_A(self, x_A: Tensor) -> tuple[Tensor, ...]:
        return x_A.split([b.n_actions for b in self.batches])

    def local_sequences(self, x_N: Tensor) -> Tensor:
        """Return this rank's entries of a tensor over all responses, in plan order."""
        return x_N[self.rank_assignment[self.rank]]

    def all_gather_sequences(self, x_N: Tensor) -> Tensor:
        """Invert `local_sequences`: [N] in the order of `responses`, on every rank. Collective."""
        out_N = x_N.new_empty(len(self.responses), *x_N.shape[1:])
        for part, indices in zip(self._gather(x_N), self.rank_assignment, strict=True):
            out_N[indices] = part
        return out_N

    def all_reduce_sequences(self, *local: Tensor) -> list[Tensor]:
        """Return tensors over this rank's sequences, [N] float64, over all `responses`, on every rank. Collective."""
        out = torch.zeros(len(local), len(self.responses), dtype=torch.float64)
        out[:, self.rank_assignment[self.rank]] = torch.stack(local)
        if self.cluster is not None:
            # Every entry is of one rank, and 0 on the others.
            out = torch.tensor(self.cluster.all_reduce_sum(out.flatten().tolist()), dtype=torch.float64).view(out.shape)
        return list(out)

    def all_gather_actions(self, x_A: Tensor) -> list[Tensor]:
        """Gather a tensor over actions from all ranks: one tensor per response. Collective."""
        out: list[Tensor] = [x_A] * len(self.responses)
        for part, indices in zip(self._gather(x_A), self.rank_assignment, strict=True):
            pieces = part.split([len(self.responses[n].tokens) for n in indices])
            for n, piece in zip(indices, pieces, strict=True):
                out[n] = piece
        return out

    def _gather(self, x: Tensor) -> list[Tensor]:
        return [x] if self.cluster is None else self.cluster.all_gather(x)

    @property
    def cu_actions(self) -> Tensor:
        """Offsets of this rank's responses in the concatenated action stream."""
        lengths = torch.tensor([len(r.tokens) for r in self.local_responses], dtype=torch.int64)
        return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)

    @property
    def mask_A(self) -> Tensor | None:
        """Which actions count, over the concatenated action stream; None if all do."""
        masks = [b.action_mask_A for b in self.batches]
        if all(mask is None for mask in masks):
            return None
        return torch.cat([torch.ones(b.n_actions, dtype=torch.bool) if m is None else m
                          for b, m in zip(self.batches, masks, strict=True)])  # fmt: skip

    @property
    def turn_starts_A(self) -> Tensor:
        """The first action of each turn, a maximal run of actions of a response that count; bool, on the host."""
        mask_A, cu_actions = self.mask_A, self.cu_actions
        return turn_starts(torch.ones(int(cu_actions[-1]), dtype=torch.bool) if mask_A is None else mask_A, cu_actions)

    @property
    def counted_lengths_N(self) -> Tensor:
        """How many actions of each of this rank's responses count, [N] int64."""
        mask_A, cu_actions = self.mask_A, self.cu_actions.long()
        if mask_A is None:
            return cu_actions.diff()
        return torch.cat([torch.zeros(1, dtype=torch.int64), mask_A.cumsum(0)])[cu_actions].diff()

    def with_masked(self, dropped_N: Tensor) -> BatchPlan:
        """Return the same sequences in the same shapes, with the actions of dropped responses masked."""
        if not bool(dropped_N.any()):
            return self
        kept = self._split_A((~dropped_N).repeat_interleave(self.cu_actions.diff().long()))
        masks = [m if b.action_mask_A is None else m & b.action_mask_A for m, b in zip(kept, self.batches, strict=True)]
        return replace(self, batches=[replace(b, action_mask_A=m) for b, m in zip(self.batches, masks, strict=True)])


def stream_seed(seed: int, stream: int) -> int:
    """Return the seed of a stream of random numbers, below 2^64; seeds of 2^32 and more are folded.

        (seed << 32) ^ stream    for seed < 2^32

    Args:
        seed: of the run, at least 0.
        stream: number of the stream, such as the iteration.
    """
    folded = 0
    for shift in range(seed.bit_length() // 32 * 32, -1, -32):
        # An odd multiplier maps the 32-bit words to each other one to one.
        folded = (folded * _ODD_MULTIPLIER & _LOW_32_BITS) ^ (seed >> shift & _LOW_32_BITS)
    return ((folded << 32) ^ stream) & _LOW_64_BITS


def plan_batches(
    responses: Sequence[Response],
    token_budget: int,
    minibatches: int = 1,
    *,
    minibatch_by: MinibatchBy = "response",
    cluster: Cluster | None = None,
    seed: int = 0,
) -> BatchPlan:
    """Assign responses to minibatches at random, and each minibatch to ranks and micro-batches.

    The random order depends on the seed and the number of responses or prompts alone, so an optimizer step sees the
    same sequences in every layout.

    Args:
        responses: of all ranks, in the order of sampling.
        token_budget: most tokens in a micro-batch, alignment tails aside.
        minibatches: number of optimizer steps.
        minibatch_by: what is drawn into a minibatch: single responses, or prompts with all their responses. Prompts are
            equal if their tokens are. With "prompt" their tokens are in a micro-batch once.
        cluster: the ranks to share them. None: this process takes all.
        seed: of the random order.
    """
    share = cluster.share if cluster is not None else Share()
    by_prompt = minibatch_by == "prompt"
    groups = group_by_prompt(responses) if by_prompt else [[n] for n in range(len(responses))]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    rank_assignment: list[list[int]] = [[] for _ in range(share.ranks)]
    batches: list[PackedBatch] = []
    steps: list[list[int]] = []
    for number in range(minibatches):
        # What one micro-batch holds together: a group, or as much of it as the budget allows.
        units = [
            unit
            for index in sorted(order[number::minibatches])
            for unit in split_group(groups[index], responses, token_budget)
        ]
        units = split_for_ranks(units, responses, share.ranks)
        assigned = [
            [[n for unit in micro_batch for n in units[unit]] for micro_batch in micro_batches]
            for micro_batches in share.assign([_n_tokens(unit, responses) for unit in units], token_budget)
        ]
        for indices, micro_batches in zip(rank_assignment, assigned, strict=True):
            indices += [n for micro_batch in micro_batches for n in micro_batch]
        local = [[responses[n] for n in micro_batch] for micro_batch in assigned[share.rank]]
        steps.append(list(range(len(batches), len(batches) + len(local))))
        batches += [
            pack(
                [r.prompt for r in members],
                [r.tokens for r in members],
                tail_multiple=share.tail_multiple,
                share_prompts=by_prompt,
            )
            for members in local
        ]
    return BatchPlan(list(responses), rank_assignment, share.rank, batches, steps, cluster)


def group_by_prompt(responses: Sequence[Response]) -> list[list[int]]:
    """Return the indices of the responses to each prompt, in the order of its first; equal tokens are one prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    tokens_of: dict[int, tuple[int, ...]] = {}
    for n, response in enumerate(responses):
        tokens = tokens_of.setdefault(response.prompt_index, tuple(response.prompt))
        groups.setdefault(tokens, []).append(n)
    return list(groups.values())


def split_group(group: list[int], responses: Sequence[Response], token_budget: int) -> list[list[int]]:
    """Split the responses to a prompt into the fewest even parts that fit the budget, each with the prompt.

    Args:
        group: indices of the responses.
        responses: of all ranks.
        token_budget: most tokens of a part, the prompt included; a single sequence must fit.
    """
    if len(group) == 1 or _n_tokens(group, responses) <= token_budget:
        return [group]
    room = token_budget - len(responses[group[0]].prompt)
    empty, others = ([n for n in group if bool(responses[n].tokens) is has_tokens] for has_tokens in (False, True))
    first, *rest = balance([len(responses[n].tokens) for n in others], token_budget=room).assignments[0]
    return [sorted([*empty, *(others[i] for i in first)]), *([others[i] for i in part] for part in rest)]


def split_for_ranks(units: list[list[int]], responses: Sequence[Response], ranks: int) -> list[list[int]]:
    """Halve the largest units, each half with its prompt, until every rank has one or all are single responses.

    Args:
        units: indices of responses to one prompt each.
        responses: of all ranks.
        ranks: data-parallel size.
    """
    units = list(units)
    while len(units) < ranks:
        largest = max(range(len(units)), key=lambda i: (len(units[i]) > 1, _n_tokens(units[i], responses)), default=-1)
        if largest < 0 or len(units[largest]) == 1:
            break
        unit = units[largest]
        half = len(unit) // 2
        units[largest : largest + 1] = [unit[:half], unit[half:]]
    return units


def _n_tokens(group: Sequence[int], responses: Sequence[Response]) -> int:
    """Return the tokens of responses to one prompt and of the prompt."""
    return len(responses[group[0]].prompt) + sum(len(responses[n].tokens) for n in group)
