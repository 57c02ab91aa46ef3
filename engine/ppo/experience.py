"""The experience of one iteration: planned into micro-batches, scored by the roles, shaped into advantages.

The plan made here serves scoring and update alike, so old and new log-probs come from identical shapes; scoring and
update read them with one routine (`linear_logprobs` and `linear_ppo_loss` share their forward), same rows, same chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.kernels import Moments, ShapedGAE, linear_logprobs, shaped_gae
from icegrt.packing import PackedBatch, Share, pack
from icegrt.ppo.scores import Scores
from icegrt.roles.role import Role
from icegrt.rollout.types import Response


@dataclass(frozen=True)
class Planned:
    """All responses of an iteration, and what of them falls to this data-parallel rank, in micro-batches.

    everyone: the responses of all ranks in their own order. places: for every rank, which of them it has, in plan order
    (the concatenation of its micro-batches). batches: this rank's micro-batches. minibatches: for each optimizer step,
    the indices of its micro-batches; every rank has as many.
    """

    everyone: list[Response]
    places: list[list[int]]
    rank: int
    batches: list[PackedBatch]
    minibatches: list[list[int]]

    @property
    def responses(self) -> list[Response]:
        """This rank's responses in plan order."""
        return [self.everyone[n] for n in self.places[self.rank]]

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

    def mine_N(self, x_N: Tensor) -> Tensor:
        """Of a tensor over everyone's responses, this rank's entries in plan order."""
        return x_N[self.places[self.rank]]

    def everyones_N(self, x_N: Tensor) -> Tensor:
        """The inverse of `mine_N`: [N] in the order of `everyone`, on every rank. A collective."""
        out_N = x_N.new_empty(len(self.everyone), *x_N.shape[1:])
        for part, places in zip(Cluster.current().gather(x_N), self.places, strict=True):
            out_N[places] = part
        return out_N

    def everyones_A(self, x_A: Tensor) -> list[Tensor]:
        """A tensor over this rank's actions as everyone's, one per response. A collective."""
        out: list[Tensor] = [x_A] * len(self.everyone)
        for part, places in zip(Cluster.current().gather(x_A), self.places, strict=True):
            pieces = part.split([len(self.everyone[n].tokens) for n in places])
            for n, piece in zip(places, pieces, strict=True):
                out[n] = piece
        return out

    @property
    def cu_actions(self) -> Tensor:
        """Offsets of this rank's responses in the concatenated action stream."""
        lengths = torch.tensor([len(r.tokens) for r in self.responses], dtype=torch.int64)
        return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)

    @property
    def mask_A(self) -> Tensor | None:
        """Which actions count, over the concatenated action stream; None where all do."""
        masks = [b.action_mask_A for b in self.batches]
        if all(mask is None for mask in masks):
            return None
        return torch.cat([torch.ones(b.n_actions, dtype=torch.bool) if m is None else m
                          for b, m in zip(self.batches, masks, strict=True)])  # fmt: skip

    def without(self, dropped_N: Tensor) -> Planned:
        """The same sequences in the same shapes, but no action of a dropped response counts anywhere."""
        if not bool(dropped_N.any()):
            return self
        kept = self.split_A((~dropped_N).repeat_interleave(self.cu_actions.diff().long()))
        masks = [m if b.action_mask_A is None else m & b.action_mask_A for m, b in zip(kept, self.batches, strict=True)]
        return replace(self, batches=[replace(b, action_mask_A=m) for b, m in zip(self.batches, masks, strict=True)])


def plan(
    responses: Sequence[Response],
    token_budget: int,
    minibatches: int = 1,
    *,
    share: Share | None = None,
    seed: int = 0,
) -> Planned:
    """Responses to minibatches by lot, and each minibatch to ranks and micro-batches of at most `token_budget` tokens.

    The lot knows the seed and the responses' order alone, so that an optimizer step sees the same sequences in every
    layout. `share`: what falls to this rank (None: everything).
    """
    share = share or Share()
    lot = torch.randperm(len(responses), generator=torch.Generator().manual_seed(seed)).tolist()
    places: list[list[int]] = [[] for _ in range(share.ranks)]
    batches: list[PackedBatch] = []
    steps: list[list[int]] = []
    for number in range(minibatches):
        members = sorted(lot[number::minibatches])
        lengths = [len(responses[n].prompt) + len(responses[n].tokens) for n in members]
        assigned = share.assign(lengths, token_budget)
        for rank, micro_batches in enumerate(assigned):
            places[rank] += [members[i] for batch in micro_batches for i in batch]
        groups = [[responses[members[i]] for i in batch] for batch in assigned[share.rank]]
        steps.append(list(range(len(batches), len(batches) + len(groups))))
        batches += [
            pack([r.prompt for r in group], [r.tokens for r in group], tail_multiple=share.tail_multiple)
            for group in groups
        ]
    return Planned(list(responses), places, share.rank, batches, steps)


@dataclass(frozen=True)
class Experience:
    """An iteration's scored and shaped responses: this rank's, all `_A` tensors over its whole action stream."""

    planned: Planned
    scores: Scores
    old_logprob_A: Tensor
    entropy_A: Tensor
    ref_logprob_A: Tensor
    value_A: Tensor
    shaped: ShapedGAE
    moments: Moments
    """Whitening moments of the advantages over all ranks."""


def score_logprobs(
    role: Role, batches: Sequence[PackedBatch], temperature: float, chunk_rows: int | None, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropies) of every action under a role, [A] float32 on the CPU."""

    def read(hidden_TH: Tensor, index: int):
        batch = batches[index].to(hidden_TH.device)
        out = linear_logprobs(
            hidden_TH[batch.action_rows_A],
            role.model.lm_weight_VH,
            batch.action_tokens_A,
            mask_A=batch.action_mask_A,
            temperature=temperature,
            entropy=entropy,
            shard=role.model.vocab_shard,
            chunk_rows=chunk_rows,
        )
        return (out.logprob_A, out.entropy_A) if entropy else (out.logprob_A,)

    columns = _joined(role.score(batches, read))
    return columns[0], columns[1] if entropy else None


def score_values(role: Role, batches: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
    """The critic's values before every action ([A]) and after every sequence's last token ([N])."""

    def read(hidden_TH: Tensor, index: int):
        batch = batches[index].to(hidden_TH.device)
        return role.model.head(hidden_TH[batch.action_rows_A]), role.model.head(hidden_TH[batch.last_rows_N])

    value_A, last_value_N = _joined(role.score(batches, read))
    return value_A, last_value_N


def score_sequences(role: Role, batches: Sequence[PackedBatch]) -> Tensor:
    """The reward model's score of every sequence, read at its last token, [N]."""

    def read(hidden_TH: Tensor, index: int):
        return (role.model.head(hidden_TH[batches[index].last_rows_N.to(hidden_TH.device)]),)

    return _joined(role.score(batches, read))[0]


def _joined(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def shape(
    config: PPOConfig,
    kl_coef: float,
    planned: Planned,
    scores: Scores,
    old_logprob_A: Tensor,
    ref_logprob_A: Tensor,
    value_A: Tensor,
    last_value_N: Tensor,
    token_reward_A: Tensor | None = None,
) -> ShapedGAE:
    """KL penalty, GAE, returns and this rank's moments in one pass over the action stream."""
    truncated_N = torch.tensor([r.truncated for r in planned.responses], dtype=torch.bool)
    bootstrap_N = torch.where(truncated_N, last_value_N, 0.0) if config.bootstrap_truncated else None
    return shaped_gae(
        scores.total_N,
        value_A,
        old_logprob_A,
        ref_logprob_A,
        planned.cu_actions,
        kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam,
        bootstrap_N=bootstrap_N,
        mask_A=planned.mask_A,
        token_reward_A=token_reward_A,
    )
