"""The experience of one iteration: planned into micro-batches, scored by the roles, shaped into advantages.

The plan made here serves scoring and update alike, so old and new log-probs come from identical shapes; scoring and
update read them with one routine (`linear_logprobs` and `linear_ppo_loss` share their forward), same rows, same chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icegrt.algorithm.scores import Scores
from icegrt.config import PPOConfig
from icegrt.kernels import Moments, ShapedGAE, linear_logprobs, shaped_gae
from icegrt.packing import PackedBatch, balance, pack
from icegrt.roles.role import Role
from icegrt.rollout.response import Response


@dataclass(frozen=True)
class Planned:
    """Responses in micro-batches: `responses` is in plan order, the concatenation of all micro-batches."""

    responses: list[Response]
    batches: list[PackedBatch]

    @property
    def padding_fraction(self) -> float:
        """Alignment tail over all tokens."""
        return sum(b.tail_tokens for b in self.batches) / sum(b.n_tokens for b in self.batches)

    def split_A(self, x_A: Tensor) -> list[Tensor]:
        """A tensor over all actions, cut into micro-batches."""
        return list(x_A.split([b.n_actions for b in self.batches]))

    @property
    def cu_actions(self) -> Tensor:
        """Offsets of the responses in the concatenated action stream."""
        lengths = torch.tensor([len(r.tokens) for r in self.responses])
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
        return Planned(self.responses, [replace(b, action_mask_A=m) for b, m in zip(self.batches, masks, strict=True)])


def plan(responses: Sequence[Response], token_budget: int, minibatches: int) -> Planned:
    """Balance responses into micro-batches of at most `token_budget` tokens, a multiple of `minibatches` of them."""
    lengths = [len(r.prompt) + len(r.tokens) for r in responses]
    (micro_batches,) = balance(lengths, token_budget=token_budget, ranks=1, round_to=minibatches).assignments
    groups = [[responses[i] for i in members] for members in micro_batches]
    batches = [pack([r.prompt for r in group], [r.tokens for r in group]) for group in groups]
    return Planned([r for group in groups for r in group], batches)


@dataclass(frozen=True)
class Experience:
    """An iteration's scored and shaped responses; all `_A` tensors run over the plan's whole action stream."""

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
        return linear_logprobs(
            hidden_TH[batch.action_rows_A],
            role.model.lm_weight_VH,
            batch.action_tokens_A,
            mask_A=batch.action_mask_A,
            temperature=temperature,
            entropy=entropy,
            shard=role.model.vocab_shard,
            chunk_rows=chunk_rows,
        )

    results = role.score(batches, read)
    logprob_A = torch.cat([r.logprob_A for r in results]).float().cpu()
    return logprob_A, torch.cat([r.entropy_A for r in results]).float().cpu() if entropy else None


def score_values(role: Role, batches: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
    """The critic's values before every action ([A]) and after every sequence's last token ([N])."""

    def read(hidden_TH: Tensor, index: int):
        batch = batches[index].to(hidden_TH.device)
        return role.model.head(hidden_TH[batch.action_rows_A]), role.model.head(hidden_TH[batch.last_rows_N])

    results = role.score(batches, read)
    return torch.cat([v for v, _ in results]).cpu(), torch.cat([b for _, b in results]).cpu()


def score_sequences(role: Role, batches: Sequence[PackedBatch]) -> Tensor:
    """The reward model's score of every sequence, read at its last token, [N]."""

    def read(hidden_TH: Tensor, index: int):
        return role.model.head(hidden_TH[batches[index].last_rows_N.to(hidden_TH.device)])

    return torch.cat(role.score(batches, read)).cpu()


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
    truncated_N = torch.tensor([r.truncated for r in planned.responses])
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
