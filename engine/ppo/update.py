"""The update: clipped policy loss for the actor, clipped value loss for the critic, one optimizer step per minibatch.

The batch plan fixes the micro-batches of each minibatch, so scoring and update see the same shapes and members in every
layout. The order of the minibatches is drawn anew in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from icegrt.config import PPOConfig
from icegrt.data import Example
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch_from_last_stage
from icegrt.kernels import PolicyStats, ValueStats
from icegrt.packing import PackedBatch
from icegrt.ppo.batch_plan import stream_seed
from icegrt.ppo.experience import Experience
from icegrt.ppo.losses import CriticLoss, PolicyLoss, PtxLoss
from icegrt.ppo.policy_rows import PolicyRows, policy_rows
from icegrt.ppo.pretraining import ValuePretraining
from icegrt.ppo.scoring import LogprobScorer
from icegrt.roles.micro_batch import MicroBatch, merge_by_type
from icegrt.roles.role import StepOutcome, TrainableRole
from icegrt.training.sft_loss import NLLStats, pack_examples


@dataclass
class UpdateOutcome:
    """The optimizer steps of an iteration.

    Attributes:
        actor: the actor's steps, in order.
        critic: the critic's steps, in order.
        stats: loss statistics of all steps, merged per statistics class (`PolicyStats`, `ValueStats`, `NLLStats`).
        empty: number of steps not taken, because no action of their minibatch counts on any rank.
        left_responses: responses of this rank that the actor's pass did not read, as their advantages are 0.
    """

    actor: list[StepOutcome] = field(default_factory=list)
    critic: list[StepOutcome] = field(default_factory=list)
    stats: dict[type, Any] = field(default_factory=dict)
    empty: int = 0
    left_responses: int = 0

    def add(self, stats: Iterable[Any]) -> None:
        """Merge statistics into `stats`, each with those of its class."""
        self.stats = merge_by_type([*self.stats.values(), *stats])

    @property
    def policy_stats(self) -> PolicyStats | None:
        """Statistics of the policy loss; None if the actor took no step."""
        return next((stats for stats in self.stats.values() if isinstance(stats, PolicyStats)), None)

    @property
    def value_stats(self) -> ValueStats | None:
        """Statistics of the value loss; None without a critic."""
        return self.stats.get(ValueStats)

    @property
    def ptx_stats(self) -> NLLStats:
        """Likelihood of the pretraining text; no tokens without ptx mixing."""
        return self.stats.get(NLLStats, NLLStats())

    @property
    def skipped(self) -> int:
        """Steps without effect, because a loss or gradient was not finite."""
        return sum(outcome.skipped for outcome in (*self.actor, *self.critic))


class Updater:
    """Run an iteration's optimizer steps on actor and critic. All ranks call it together."""

    def __init__(
        self,
        config: PPOConfig,
        actor: TrainableRole,
        critic: TrainableRole | None,
        scorer: LogprobScorer,
        cluster: Cluster,
    ) -> None:
        self.config, self.actor, self.critic = config, actor, critic
        self.scorer, self.cluster = scorer, cluster

    def run(
        self,
        experience: Experience,
        kl_coef: float,
        iteration: int,
        ptx: Sequence[Sequence[Example]] = (),
        *,
        pretraining: ValuePretraining | None = None,
        value_step: StepOutcome | None = None,
    ) -> UpdateOutcome:
        """Take `minibatches` steps in each of `ppo_epochs` passes of the actor, then of `critic.epochs` of the critic.

        Args:
            experience: this rank's scored responses.
            kl_coef: the KL coefficient if `kl_in` is "loss".
            iteration: from 1; it seeds the order of the minibatches and decides about the critic's warm-up.
            ptx: one batch of examples per actor step, or none.
            pretraining: of which this is an iteration, and the critic alone learns, or which is over; None: there is
                none.
            value_step: the critic's first step, if it was taken to read the values (`ppo.value_reuse`).
        """
        outcome = UpdateOutcome()
        counted = self._counted_actions(experience)
        ptx_work = self._ptx_work(ptx)
        is_pretraining = pretraining is not None and not pretraining.is_over
        before = pretraining.done_iterations if pretraining is not None else 0
        warming_up = is_pretraining or iteration - before <= self.config.critic_warmup
        # The actor takes all its steps before the critic, so that one role at a time needs the device.
        actor_epochs = 0 if warming_up else self.config.ppo_epochs
        rows = PolicyRows(experience)
        if actor_epochs:
            rows = policy_rows(self.config, experience, kl_coef, self.cluster)
        outcome.left_responses = rows.left_responses
        for step, members, actions in self._steps(rows.experience, iteration, actor_epochs, counted, outcome):
            mixed = ptx_work[step](actions) if ptx_work else []
            self._actor_step(rows, members, kl_coef, mixed, outcome)
        critic_epochs = 0 if self.critic is None else self.config.critic_epochs
        critic_steps = self._steps(experience, iteration, critic_epochs, counted, outcome)
        if value_step is not None:
            next(critic_steps)
            outcome.critic.append(value_step)
            outcome.add(value_step.stats)
        for _, members, _ in critic_steps:
            self._critic_step(experience, members, outcome, pretraining if is_pretraining else None)
        # The statistics stay on the device of the last pipeline stage until here.
        outcome.stats = fetch_from_last_stage(outcome.stats)
        return outcome

    def _steps(
        self, experience: Experience, iteration: int, epochs: int, counted: list[float], outcome: UpdateOutcome
    ) -> Iterator[tuple[int, list[int], float]]:
        """Yield a role's optimizer steps: number, members of the minibatch, and its number of counted actions."""
        for epoch in range(epochs):
            for number, minibatch in enumerate(self._minibatch_order(iteration, epoch)):
                if counted[minibatch]:
                    members = experience.plan.minibatches[minibatch]
                    yield epoch * self.config.minibatches + number, members, counted[minibatch]
                else:
                    # All its responses were dropped. A step would still change the weights, by Adam's momentum.
                    outcome.empty += 1

    def policy_work(
        self,
        experience: Experience,
        members: Sequence[int],
        kl_coef: float,
        *,
        may_clip: bool = True,
        left_actions: Sequence[int] = (),
    ) -> list[MicroBatch]:
        """Return the micro-batches `members` with the actor's loss.

        Args:
            experience: this rank's responses.
            members: indices of micro-batches.
            kl_coef: of the KL in the loss.
            may_clip: the actor has moved since scoring.
            left_actions: by micro-batch, actions that count beside its own; empty: none.
        """
        moments = experience.whitening_moments(self.config)
        moments = None if moments is None else moments.to(self.actor.device)
        loss = PolicyLoss(self.config, self.actor, kl_coef, moments, self.scorer, may_clip)
        weights, old_A = experience.weights, experience.old_logprob_A
        if self.config.correction == "dis":
            assert experience.rollout_logprob_A is not None
            old_A = experience.rollout_logprob_A
        streams = {
            "old_logprob_A": old_A,
            "ref_logprob_A": experience.ref_logprob_A,
            "advantage_A": experience.shaped.advantage_A,
        }
        streams |= {} if weights.weight_A is None else {"weight_A": weights.weight_A}
        batches = experience.plan.action_batches(members, **streams)
        if weights.positive is not None:
            positive = [weights.positive[i] for i in members]
            batches = [
                replace(batch, positive_index_P=rows.index_P, positive_scale=rows.scale)
                for batch, rows in zip(batches, positive, strict=True)
            ]
        if left_actions:
            left = [left_actions[i] for i in members]
            batches = [replace(batch, left_actions=n) for batch, n in zip(batches, left, strict=True)]
        return [MicroBatch(batch, loss) for batch in batches]

    def critic_work(
        self, experience: Experience, members: Sequence[int], pretraining: ValuePretraining | None = None
    ) -> list[MicroBatch]:
        """Return the micro-batches `members` with the critic's loss, of PPO or of pretraining. It needs a critic."""
        assert self.critic is not None and experience.value_A is not None
        config = self.config if pretraining is None else pretraining.config
        loss = CriticLoss(self.critic, config.value_clip or None)
        streams = {"old_value_A": experience.value_A, "return_A": experience.shaped.return_A}
        if config.advantage_unit == "turn":
            streams["value_mask_A"] = experience.plan.turn_starts_A
        batches = experience.plan.action_batches(members, **streams)
        return [MicroBatch(batch, loss) for batch in batches]

    def _minibatch_order(self, iteration: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(stream_seed(self.config.run.seed, (iteration << 8) ^ epoch))
        order: list[int] = torch.randperm(self.config.minibatches, generator=generator).tolist()
        return order

    def _actor_step(
        self,
        rows: PolicyRows,
        members: list[int],
        kl_coef: float,
        ptx: Sequence[MicroBatch],
        outcome: UpdateOutcome,
    ) -> None:
        # Other micro-batches than those of scoring round differently, so that a ratio of 1 may be off by rounding.
        may_clip = bool(outcome.actor) or bool(rows.left_actions)
        work = self.policy_work(rows.experience, members, kl_coef, may_clip=may_clip, left_actions=rows.left_actions)
        step = self.actor.train_step([*work, *ptx])
        outcome.actor.append(step)
        outcome.add(merge_by_type(step.stats).values())

    def _ptx_work(self, ptx: Sequence[Sequence[Example]]) -> list[Callable[[float], list[MicroBatch]]]:
        """Return for each actor step a function from its number of actions to its micro-batches of ptx text."""
        packed = [pack_examples(examples, self.config.token_budget, self.cluster.share) for examples in ptx]
        tokens = self._sum_over_ranks([sum(batch.n_counted_actions for batch in batches) for batches in packed])

        def work(batches: Sequence[PackedBatch], tokens: float, actions: float) -> list[MicroBatch]:
            # Megatron divides the whole step by the number of actions; `scale` turns that into a mean over ptx tokens.
            loss = PtxLoss(self.actor, self.config.ptx_coef * actions / max(tokens, 1), self.scorer.chunk_rows)
            return [MicroBatch(batch, loss) for batch in batches]

        return [partial(work, batches, total) for batches, total in zip(packed, tokens, strict=True)]

    def _critic_step(
        self, experience: Experience, members: list[int], outcome: UpdateOutcome, pretraining: ValuePretraining | None
    ) -> None:
        assert self.critic is not None
        work = self.critic_work(experience, members, pretraining)
        if pretraining is None:
            step = self.critic.train_step(work)
        else:
            step = self.critic.train_step(work, lr=pretraining.learning_rate)
        outcome.critic.append(step)
        outcome.add(step.stats)

    def _counted_actions(self, experience: Experience) -> list[float]:
        """Return the number of actions of each minibatch that count, over all ranks."""
        plan = experience.plan
        return self._sum_over_ranks(
            [sum(plan.batches[i].n_counted_actions for i in members) for members in plan.minibatches]
        )

    def _sum_over_ranks(self, counts: list[int]) -> list[float]:
        return self.cluster.all_reduce_sum(counts) if counts else []


def mean_grad_norm(outcomes: Sequence[StepOutcome]) -> float:
    """Return the mean gradient norm of the steps that took effect; NaN if none did."""
    norms = [o.grad_norm for o in outcomes if not o.skipped]
    return sum(norms) / len(norms) if norms else math.nan
