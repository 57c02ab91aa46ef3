"""The update: clipped policy loss for the actor, clipped value loss for the critic, one optimizer step per minibatch.

The plan says which micro-batches make a minibatch, so that neither shapes nor members change between scoring, update
and layouts; the order of the minibatches is drawn anew in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.data import Example
from icegrt.distributed.cluster import Cluster
from icegrt.kernels import linear_ppo_loss, value_loss
from icegrt.packing import PackedBatch
from icegrt.ppo.experience import Experience
from icegrt.roles.role import Loss, Role, StepOutcome
from icegrt.training.sft_loss import pack_examples, response_nll


@dataclass
class UpdateOutcome:
    """What the optimizer steps of an iteration did, in order; statistics merged over all of them."""

    actor: list[StepOutcome] = field(default_factory=list)
    critic: list[StepOutcome] = field(default_factory=list)
    policy_stats: Any = None
    first_policy_stats: Any = None
    """Statistics of the very first minibatch, before any weight moved: its ratio is exactly 1."""
    value_stats: Any = None
    ptx_loss_sum: float = 0.0
    ptx_tokens: int = 0
    empty: int = 0
    """Steps that were not taken, because no action of their minibatch counts on any rank."""

    @property
    def skipped(self) -> int:
        return sum(outcome.skipped for outcome in (*self.actor, *self.critic))


class Updater:
    """Runs an iteration's optimizer steps on actor and critic."""

    def __init__(
        self,
        config: PPOConfig,
        actor: Role,
        critic: Role,
        chunk_rows: int | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.config, self.actor, self.critic = config, actor, critic
        self.chunk_rows, self.group = chunk_rows, group

    def run(
        self, experience: Experience, kl_coef: float, iteration: int, ptx: Sequence[Sequence[Example]] = ()
    ) -> UpdateOutcome:
        """Passes of `minibatches` steps: `ppo_epochs` for the actor, `critic.epochs` for the critic.

        `ptx`: one batch of examples per actor step, or none.
        """
        outcome = UpdateOutcome()
        warming_up = iteration <= self.config.critic.warmup_iterations
        actor_epochs = 0 if warming_up else self.config.ppo_epochs
        for epoch in range(max(actor_epochs, self.config.critic_epochs)):
            for number, members in enumerate(self._minibatches(experience, iteration, epoch)):
                if not self._counted(experience, members):
                    # Every response of it was dropped. Adam would move the weights all the same, by its momentum.
                    outcome.empty += (epoch < actor_epochs) + (epoch < self.config.critic_epochs)
                    continue
                if epoch < actor_epochs:
                    step = epoch * self.config.minibatches + number
                    self._actor_step(experience, members, kl_coef, ptx[step] if ptx else (), outcome)
                if epoch < self.config.critic_epochs:
                    self._critic_step(experience, members, outcome)
        return outcome

    def _minibatches(self, experience: Experience, iteration: int, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.config.run.seed << 32) ^ (iteration << 8) ^ epoch)
        order = torch.randperm(self.config.minibatches, generator=generator).tolist()
        return [experience.plan.minibatches[i] for i in order]

    def _actor_step(
        self, experience: Experience, members: list[int], kl_coef: float, ptx: Sequence[Example], outcome: UpdateOutcome
    ) -> None:
        batches = [experience.plan.batches[i] for i in members]
        loss = self.policy_loss(experience, members, kl_coef)
        losses = [lambda hidden, i: loss(hidden, i)] * len(batches)
        if ptx:
            ptx_batches = pack_examples(ptx, self.config.token_budget, Cluster.current().share)
            ptx_loss = self._ptx_loss(ptx_batches, self._counted(experience, members), len(batches))
            batches, losses = batches + ptx_batches, losses + [ptx_loss] * len(ptx_batches)
        step = self.actor.step(batches, lambda hidden, i: losses[i](hidden, i))
        outcome.actor.append(step)
        policy = [stats for stats in step.stats if not isinstance(stats, tuple)]
        for total, tokens in (stats for stats in step.stats if isinstance(stats, tuple)):
            outcome.ptx_loss_sum += total
            outcome.ptx_tokens += tokens
        merged = _merge(policy)
        outcome.policy_stats = _merge([outcome.policy_stats, merged])
        outcome.first_policy_stats = outcome.first_policy_stats or merged

    def policy_loss(self, experience: Experience, members: list[int], kl_coef: float):
        """The actor's loss of the i-th of `members`: sum, count and `PolicyStats`."""
        config, plan, model = self.config, experience.plan, self.actor.model
        old, advantage, reference = (
            plan.split_A(x) for x in (experience.old_logprob_A, experience.shaped.advantage_A, experience.ref_logprob_A)
        )
        moments = experience.moments.to(self.actor.device) if config.whiten_advantages else None

        def loss(hidden_TH: Tensor, i: int) -> Loss:
            index = members[i]
            batch = plan.batches[index].to(hidden_TH.device)
            in_loss = config.kl_in == "loss" and kl_coef > 0
            out = linear_ppo_loss(
                hidden_TH[batch.action_rows_A],
                model.lm_weight_VH,
                batch.action_tokens_A,
                None if config.reuse_update_logprob else old[index].to(hidden_TH.device),
                advantage[index].to(hidden_TH.device),
                ref_logprob_A=reference[index].to(hidden_TH.device) if in_loss else None,
                mask_A=batch.action_mask_A,
                normalizer=1.0,  # Megatron divides by the global count
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                kl_coef=kl_coef if in_loss else 0.0,
                kl_estimator=config.kl_estimator,
                entropy_coef=config.entropy_coef,
                temperature=config.sampling.temperature,
                moments=moments,
                shard=model.vocab_shard,
                chunk_rows=self.chunk_rows,
            )
            return out.loss, batch.n_counted_actions, out.stats

        return loss

    def _ptx_loss(self, batches: list[PackedBatch], actions: float, offset: int):
        # Megatron divides everything by the number of actions; a mean over ptx tokens is put on that footing here.
        tokens = self._global(sum(batch.n_counted_actions for batch in batches))
        scale = self.config.ptx_coef * actions / max(tokens, 1)

        def loss(hidden_TH: Tensor, i: int) -> Loss:
            batch = batches[i - offset].to(hidden_TH.device)
            total = response_nll(self.actor, hidden_TH, batch, self.chunk_rows)
            return total * scale, 0, (float(total.detach()), batch.n_counted_actions)

        return loss

    def _critic_step(self, experience: Experience, members: list[int], outcome: UpdateOutcome) -> None:
        batches = [experience.plan.batches[i] for i in members]
        step = self.critic.step(batches, self.critic_loss(experience, members))
        outcome.critic.append(step)
        outcome.value_stats = _merge([outcome.value_stats, *step.stats])

    def critic_loss(self, experience: Experience, members: list[int]):
        """The critic's loss of the i-th of `members`: sum, count and `ValueStats`."""
        plan, clip = experience.plan, self.config.value_clip or None
        old, returns = (plan.split_A(x) for x in (experience.value_A, experience.shaped.return_A))

        def loss(hidden_TH: Tensor, i: int) -> Loss:
            index = members[i]
            batch = plan.batches[index].to(hidden_TH.device)
            out = value_loss(
                self.critic.model.head(hidden_TH[batch.action_rows_A]),
                old[index].to(hidden_TH.device),
                returns[index].to(hidden_TH.device),
                clip=clip,
                normalizer=1.0,
                mask_A=batch.action_mask_A,
            )
            return out.loss, batch.n_counted_actions, out.stats

        return loss

    def _counted(self, experience: Experience, members: list[int]) -> float:
        """Actions of a minibatch that count, over all ranks."""
        return self._global(sum(experience.plan.batches[i].n_counted_actions for i in members))

    def _global(self, count: int) -> float:
        total = torch.tensor(float(count), dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.item()


def _merge(parts: list[Any]) -> Any:
    merged = None
    for part in parts:
        merged = part if merged is None else merged.merge(part) if part is not None else merged
    return merged


def mean_grad_norm(outcomes: Sequence[StepOutcome]) -> float:
    """Mean gradient norm of the steps that were taken; NaN where none was."""
    norms = [o.grad_norm for o in outcomes if not o.skipped]
    return sum(norms) / len(norms) if norms else math.nan
