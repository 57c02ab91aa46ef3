"""The critic's step without an inference pass: its own forward gives the old values, and its returns follow from them.

A return depends on its own sequence alone. So the loss of a micro-batch reads the values, forms the returns of the
micro-batch's responses by GAE, and compares both; backward follows. The numbers are those of an inference pass over the
same micro-batches. What whitens advantages is of the whole minibatch: the actor learns after the critic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.distributed.pipeline import broadcast_from_last_stage
from icegrt.ppo.batch_plan import ActionBatch, BatchPlan
from icegrt.ppo.experience import compute_advantages
from icegrt.ppo.losses import squared_error
from icegrt.ppo.scores import Scores
from icegrt.roles.micro_batch import LossOutput, MicroBatch
from icegrt.roles.role import Role, StepOutcome, TrainableRole


@dataclass(frozen=True)
class ValueStep:
    """The critic's first step of an iteration, and the values before it.

    Attributes:
        value_A: before every action, [A] float32 on the device of every pipeline stage.
        last_value_N: after every response's last token, [N] likewise.
        outcome: of the step.
    """

    value_A: Tensor
    last_value_N: Tensor
    outcome: StepOutcome


@dataclass(frozen=True)
class OwnReturnsLoss:
    """The critic's squared error against returns that it forms from its own values.

    Attributes:
        critic: the critic.
        clip: as in `CriticLoss`. It bounds nothing here: a value is its own old value.
        returns: from values [A] and last values [N] to the returns, [A].
        value_A, last_value_N: the micro-batch's part of the iteration's values, which is filled.
    """

    critic: Role
    clip: float | None
    returns: Callable[[Tensor, Tensor], Tensor]
    value_A: Tensor
    last_value_N: Tensor

    def __call__(self, hidden_TH: Tensor, batch: ActionBatch) -> LossOutput:
        head = self.critic.model.head
        value_A = head(hidden_TH[batch.action_rows_A])
        with torch.no_grad():
            old_A, last_N = value_A.detach().float(), head(hidden_TH[batch.last_rows_N]).float()
            return_A = self.returns(old_A, last_N)
            self.value_A.copy_(old_A)
            self.last_value_N.copy_(last_N)
        return squared_error(value_A, old_A, return_A, self.clip, batch)


def learn_values(
    config: PPOConfig,
    critic: TrainableRole,
    kl_coef: float,
    plan: BatchPlan,
    scores: Scores,
    old_logprob_A: Tensor,
    ref_logprob_A: Tensor,
    token_reward_A: Tensor | None = None,
    *,
    lr: float | None = None,
) -> ValueStep:
    """Take the critic's step on all micro-batches of a plan with one minibatch. Collective.

    A value that is no number makes the loss no number, and the step is skipped: the caller finds it in `value_A`.

    Args:
        config: of the returns; `value_clip` and what `compute_advantages` reads.
        critic: the critic.
        kl_coef, plan, scores, old_logprob_A, ref_logprob_A, token_reward_A: as in `compute_advantages`. At least one
            action counts on some rank.
        lr: learning rate in place of the schedule's; None: the schedule's.
    """
    # 1. The micro-batches, each with its part of what the recursion reads and of what the step returns.
    actions = [batch.n_actions for batch in plan.batches]
    sequences = [batch.n_sequences for batch in plan.batches]
    value_A = torch.empty(sum(actions), device=critic.device)
    last_value_N = torch.empty(sum(sequences), device=critic.device)
    streams = {"value_mask_A": plan.turn_starts_A} if config.advantage_unit == "turn" else {}
    batches = plan.action_batches(range(len(plan.batches)), **streams)
    columns = zip(
        batches,
        value_A.split(actions),
        last_value_N.split(sequences),
        scores.total_N.split(sequences),
        old_logprob_A.split(actions),
        ref_logprob_A.split(actions),
        [None] * len(batches) if token_reward_A is None else token_reward_A.split(actions),
        strict=True,
    )
    work = []
    for index, (batch, out_A, out_N, total_N, old_A, ref_A, reward_A) in enumerate(columns):
        part = plan.micro_batch(index), replace(scores, total_N=total_N)
        returns = partial(_returns, config, kl_coef, *part, old_A, ref_A, reward_A)
        work.append(MicroBatch(batch, OwnReturnsLoss(critic, config.value_clip or None, returns, out_A, out_N)))
    # 2. The step. The last pipeline stage fills the values.
    outcome = critic.train_step(work, lr)
    sizes = [(sum(actions), sum(sequences))]
    ((value_A, last_value_N),) = broadcast_from_last_stage([(value_A, last_value_N)], sizes, critic.device)
    return ValueStep(value_A, last_value_N, outcome)


def _returns(
    config: PPOConfig,
    kl_coef: float,
    plan: BatchPlan,
    scores: Scores,
    old_logprob_A: Tensor,
    ref_logprob_A: Tensor,
    token_reward_A: Tensor | None,
    value_A: Tensor,
    last_value_N: Tensor,
) -> Tensor:
    """Return the returns of a micro-batch, [A]; arguments as in `compute_advantages`."""
    shaped = compute_advantages(
        config, kl_coef, plan, scores, old_logprob_A, ref_logprob_A, value_A, last_value_N, token_reward_A
    )
    return shaped.return_A
