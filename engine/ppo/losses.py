"""The losses of PPO's two learners, and ptx mixing. Megatron divides their sums by the count over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.kernels import Moments, linear_ppo_loss, value_loss
from icegrt.packing import PackedBatch
from icegrt.ppo.batch_plan import ActionBatch
from icegrt.ppo.scoring import LogprobScorer
from icegrt.roles.micro_batch import LossOutput
from icegrt.roles.role import Role
from icegrt.training.sft_loss import NLLStats, response_nll


@dataclass(frozen=True)
class PolicyLoss:
    """The actor's clipped surrogate, with KL in the loss and an entropy bonus as configured; counted per action.

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
        weight_VH, weight_grad_VH = model.lm_weight_and_grad()
        out = linear_ppo_loss(
            hidden_TH[batch.action_rows_A],
            weight_VH,
            batch.action_tokens_A,
            None if config.reuse_update_logprob else batch.old_logprob_A,
            batch.advantage_A,
            ref_logprob_A=batch.ref_logprob_A if kl_in_loss else None,
            mask_A=batch.action_mask_A,
            normalizer=1.0,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
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
        )
        stats = out.stats
        if batch.left_actions:
            stats = replace(stats, count=stats.count + batch.left_actions)
        return LossOutput(out.loss, batch.n_counted_actions + batch.left_actions, stats)


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
    """The critic's clipped squared error against the returns; counted per action."""

    critic: Role
    clip: float | None

    def __call__(self, hidden_TH: Tensor, batch: ActionBatch) -> LossOutput:
        out = value_loss(
            self.critic.model.head(hidden_TH[batch.action_rows_A]),
            batch.old_value_A,
            batch.return_A,
            clip=self.clip,
            normalizer=1.0,
            mask_A=batch.action_mask_A,
        )
        return LossOutput(out.loss, batch.n_counted_actions, out.stats)
