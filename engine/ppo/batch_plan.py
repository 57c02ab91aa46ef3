"""Which rank takes which response, in which micro-batch and minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icegrt.distributed.cluster import Cluster
from icegrt.packing import PackedBatch, Share, pack
from icegrt.rollout.types import Response


@dataclass(frozen=True)
class BatchPlan:
    """All responses of an iteration, and the micro-batches of this data-parallel rank.

    responses: of all ranks, in the order of sampling. rank_assignment: for each rank, the indices of its responses in
    plan order (the concatenation of its micro-batches). batches: this rank's micro-batches. minibatches: for each
    optimizer step, the indices of its micro-batches; every rank has as many.
    """

    responses: list[Response]
    rank_assignment: list[list[int]]
    rank: int
    batches: list[PackedBatch]
    minibatches: list[list[int]]

    @property
    def local_responses(self) -> list[Response]:
        """This rank's responses in plan order."""
        return [self.responses[n] for n in self.rank_assignment[self.rank]]

    @property
    def n_tokens(self) -> int:
        """Tokens of this rank's micro-batches, alignment tails included."""
        return sum(b.n_tokens for b in self.batches)

    @property
    def tail_tokens(self) -> int:
        """Alignment tails of this rank's micro-batches."""
        return sum(b.tail_tokens for b in self.batches)

    def split_A(self, x_A: Tensor) -> list[Tensor]:
        """A tensor over this rank's actions, cut into micro-batches."""
        return list(x_A.split([b.n_actions for b in self.batches]))

    def local_sequences(self, x_N: Tensor) -> Tensor:
        """Return this rank's entries of a tensor over all responses, in plan order."""
        return x_N[self.rank_assignment[self.rank]]

    def all_gather_sequences(self, x_N: Tensor) -> Tensor:
        """Invert `local_sequences`: [N] in the order of `responses`, on every rank. Collective."""
        out_N = x_N.new_empty(len(self.responses), *x_N.shape[1:])
        for part, indices in zip(Cluster.current().all_gather(x_N), self.rank_assignment, strict=True):
            out_N[indices] = part
        return out_N

    def all_gather_actions(self, x_A: Tensor) -> list[Tensor]:
        """Gather a tensor over actions from all ranks: one tensor per response. Collective."""
        out: list[Tensor] = [x_A] * len(self.responses)
        for part, indices in zip(Cluster.current().all_gather(x_A), self.rank_assignment, strict=True):
            pieces = part.split([len(self.responses[n].tokens) for n in indices])
            for n, piece in zip(indices, pieces, strict=True):
                out[n] = piece
        return out

    @property
    def cu_actions(self) -> Tensor:
        """Offsets of this rank's responses in the concatenated action stream."""
        lengths = torch.tensor([len(r.tokens) for r in self.local_responses], dtype=torch.int64)
        return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)

    @property
    def mask_A(self) -> Tensor | None:
        """Which actions count, over the concatenated action stream; None where all do."""
        masks = [b.action_mask_A for b in self.batches]
        if all(mask is None for mask in masks):
            return None
        return torch.cat([torch.ones(b.n_actions, dtype=torch.bool) if m is None else m
                          for b, m in zip(self.batches, masks, strict=True)])  # fmt: skip

    def with_masked(self, dropped_N: Tensor) -> BatchPlan:
        """The same sequences in the same shapes, but no action of a dropped response counts anywhere."""
        if not bool(dropped_N.any()):
            return self
        kept = self.split_A((~dropped_N).repeat_interleave(self.cu_actions.diff().long()))
        masks = [m if b.action_mask_A is None else m & b.action_mask_A for m, b in zip(kept, self.batches, strict=True)]
        return replace(self, batches=[replace(b, action_mask_A=m) for b, m in zip(self.batches, masks, strict=True)])


def plan_batches(
    responses: Sequence[Response],
    token_budget: int,
    minibatches: int = 1,
    *,
    share: Share | None = None,
    seed: int = 0,
) -> BatchPlan:
    """Responses to minibatches by lot, and each minibatch to ranks and micro-batches of at most `token_budget` tokens.

    The lot knows the seed and the responses' order alone, so that an optimizer step sees the same sequences in every
    layout. `share`: what falls to this rank (None: everything).
    """
    share = share or Share()
    lot = torch.randperm(len(responses), generator=torch.Generator().manual_seed(seed)).tolist()
    rank_assignment: list[list[int]] = [[] for _ in range(share.ranks)]
    batches: list[PackedBatch] = []
    steps: list[list[int]] = []
    for number in range(minibatches):
        members = sorted(lot[number::minibatches])
        lengths = [len(responses[n].prompt) + len(responses[n].tokens) for n in members]
        assigned = share.assign(lengths, token_budget)
        for rank, micro_batches in enumerate(assigned):
            rank_assignment[rank] += [members[i] for batch in micro_batches for i in batch]
        groups = [[responses[members[i]] for i in batch] for batch in assigned[share.rank]]
        steps.append(list(range(len(batches), len(batches) + len(groups))))
        batches += [
            pack([r.prompt for r in group], [r.tokens for r in group], tail_multiple=share.tail_multiple)
            for group in groups
        ]
    return BatchPlan(list(responses), rank_assignment, share.rank, batches, steps)
