"""The losses of PPO's two learners, and ptx mixing. Megatron divides their sums by the count over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.kernels import Moments, PolicyStats, linear_logprobs, linear_ppo_loss, value_loss
from icegrt.packing import PackedBatch
from icegrt.ppo.batch_plan import ActionBatch
from icegrt.ppo.corrections import anchor_of_sequence_ratio
from icegrt.ppo.scoring import LogprobScorer
from icegrt.roles.micro_batch import LossOutput
from icegrt.roles.role import Role
from icegrt.training.sft_loss import NLLStats, response_nll


@dataclass(frozen=True)
class PolicyNLLStats(PolicyStats):
    """Statistics of a policy loss with the positive-example loss: its sum of -log p in nats, and its tokens."""

    nll_sum: Tensor
    nll_tokens: Tensor


@dataclass(frozen=True)
class ReducedPassStats(PolicyStats):
    """Statistics of a pass that some responses left: `count` has their tokens, the other sums and extremes do not.

    Attributes:
        left_tokens: the counted tokens that left.
    """

    left_tokens: Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The actor's surrogate, with KL in the loss, entropy bonus and positive examples as configured; per action.

    moments: whitening moments of the advantages over all ranks, on the actor's device; None: advantages as they are.
    may_clip: whether the actor may have moved since it was scored. If not, every ratio is 1 and no row is clipped.
    """

    config: PPOConfig
    actor: Role
    kl_coef: float
    moments: Moments | None
    scorer: LogprobScorer
    may_clip: bool = True

    def __call__(self, hidden_TH: Tensor, batch: ActionBatch) -> LossOutput:
        config, model = self.config, self.actor.model
        kl_in_loss = config.kl_in == "loss" and self.kl_coef > 0
        masks = config.correction == "dis"
        old_logprob_A = self._old_logprob(hidden_TH, batch)
        weight_VH, weight_grad_VH = model.lm_weight_and_grad()
        out = linear_ppo_loss(
            hidden_TH[batch.action_rows_A],
            weight_VH,
            batch.action_tokens_A,
            old_logprob_A,
            batch.advantage_A,
            ref_logprob_A=batch.ref_logprob_A if kl_in_loss else None,
            mask_A=batch.action_mask_A,
            weight_A=batch.weight_A,
            normalizer=1.0,
            clip_low=config.dis_low if masks else config.clip_low,
            clip_high=config.dis_high if masks else config.clip_high,
            dual_clip=config.dual_clip,
            kl_coef=self.kl_coef if kl_in_loss else 0.0,
            kl_estimator=config.kl_estimator,
            entropy_coef=config.entropy_coef,
            temperature=self.scorer.temperature,
            moments=self.moments,
            shard=model.vocab_shard,
            chunk_rows=self.scorer.chunk_rows,
            weight_grad_out=weight_grad_VH,
            rows_R=batch.counted_index,
            drop_inactive=self.may_clip,
            surrogate="mask" if masks else "clip",
        )
        loss, count, stats = out.loss, batch.n_counted_actions, out.stats
        if batch.left_actions is not None:
            count += batch.left_actions
            left = torch.full_like(stats.count, batch.left_actions)
            stats = ReducedPassStats(**vars(stats) | {"count": stats.count + left}, left_tokens=left)
        if batch.positive_index_P is not None:
            nll = self._positive_nll(hidden_TH, batch, batch.positive_index_P, (weight_VH, weight_grad_VH))
            tokens = torch.full_like(stats.count, batch.positive_index_P.numel())
            stats = PolicyNLLStats(**vars(stats), nll_sum=nll.detach().double(), nll_tokens=tokens)
            loss = loss + config.positive_nll_coef * batch.positive_scale * nll
        return LossOutput(loss, count, stats)

    def _old_logprob(self, hidden_TH: Tensor, batch: ActionBatch) -> Tensor | None:
        """Return the log-probs in the ratio's denominator, [A]; None: the update's own, so that the ratio is 1."""
        config = self.config
        if config.reuse_update_logprob:
            return None
        if config.correction != "dis" or config.correction_level == "token":
            return batch.old_logprob_A
        # A response's ratio needs all its tokens before the loss reads the first: one more product with the head.
        with torch.no_grad():
            logprob_A = self.scorer.read(self.actor, hidden_TH, batch).logprob_A
        assert batch.old_logprob_A is not None
        return anchor_of_sequence_ratio(logprob_A, batch.old_logprob_A, batch)

    def _positive_nll(
        self, hidden_TH: Tensor, batch: ActionBatch, index_P: Tensor, head: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """Return -log p under the sampling distribution, summed over the tokens `index_P` of the action stream."""
        weight_VH, weight_grad_VH = head
        out = linear_logprobs(
            hidden_TH[batch.action_rows_A[index_P]],
            weight_VH,
            batch.action_tokens_A[index_P],
            temperature=self.scorer.temperature,
            shard=self.actor.model.vocab_shard,
            chunk_rows=self.scorer.chunk_rows,
            weight_grad_out=weight_grad_VH,
            rows_R=slice(None),
        )
        return -out.logprob_A.sum()


@dataclass(frozen=True)
class PtxLoss:
    """scale * -log p of pretraining text, summed; it adds nothing to the count."""

    actor: Role
    scale: float
    chunk_rows: int | None

    def __call__(self, hidden_TH: Tensor, batch: PackedBatch) -> LossOutput:
        nll = response_nll(self.actor, hidden_TH, batch, self.chunk_rows)
        return LossOutput(nll * self.scale, 0, NLLStats(nll.detach().double(), batch.n_counted_actions))


@dataclass(frozen=True)
class CriticLoss:
    """The critic's clipped squared error against the returns; counted per action that has one."""

    critic: Role
    clip: float | None

    def __call__(self, hidden_TH: Tensor, batch: ActionBatch) -> LossOutput:
        value_A = self.critic.model.head(hidden_TH[batch.action_rows_A])
        return squared_error(value_A, batch.old_value_A, batch.return_A, self.clip, batch)


def squared_error(
    value_A: Tensor, old_value_A: Tensor | None, return_A: Tensor | None, clip: float | None, batch: ActionBatch
) -> LossOutput:
    """Return the critic's loss of a micro-batch, with one entry for each action that has a return.

    Args:
        value_A: of the critic, [A].
        old_value_A: those before the update, [A]; read with `clip`.
        return_A: [A].
        clip: distance from the old value beyond which a value is clipped; None: no clipping.
        batch: the micro-batch.
    """
    mask_A = batch.action_mask_A if batch.value_mask_A is None else batch.value_mask_A
    out = value_loss(value_A, old_value_A, return_A, clip=clip, normalizer=1.0, mask_A=mask_A)
    return LossOutput(out.loss, batch.n_returns, out.stats)
