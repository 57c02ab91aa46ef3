"""The inference of an iteration: log-probs, values and rewards of the sampled responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.corrections import score_policies
from icegrt.ppo.dynamic_sampling import Selection
from icegrt.ppo.inference_checks import check_logprobs, locate_reward_errors, require_one_score
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.scoring import score_values
from icegrt.ppo.setup import PPOComponents


@dataclass(frozen=True)
class Inference:
    """What models and reward sources return for the responses of an iteration.

    Attributes:
        plan: micro-batches of this rank, with the actions of dropped responses masked.
        all_rewards: of the responses of all ranks, in the order of sampling.
        rewards: of this rank's responses, in plan order.
        old_logprob_A, entropy_A, ref_logprob_A, value_A: as in `Experience`.
        last_value_N: values after every response's last token, [N] float32 on the device; None without a critic.
            Both values are None as long as the critic's first step is to give them (`ppo.value_reuse`).
    """

    plan: BatchPlan
    all_rewards: RewardOutputs
    rewards: RewardOutputs
    old_logprob_A: Tensor
    entropy_A: Tensor | None
    ref_logprob_A: Tensor
    value_A: Tensor | None
    last_value_N: Tensor | None


def infer(
    config: PPOConfig,
    parts: PPOComponents,
    cluster: Cluster,
    plan: BatchPlan,
    prompts: Sequence[Prompt],
    iteration: int,
    selection: Selection | None = None,
) -> Inference:
    """Run critic, actor and reference over a plan while reward functions and HTTP scorers run. Collective.

    Args:
        config: of the run.
        parts: models and reward computer.
        cluster: the ranks.
        plan: this rank's responses.
        prompts: of the iteration.
        iteration: for messages.
        selection: of the prompts, whose responses are scored already; None: score them.

    Raises:
        RewardError: a source of reward fails and ends the run, or every response was dropped.
        RunError: a log-prob or value is no number.
    """
    # 1. Start the reward sources, and read values and log-probs.
    with locate_reward_errors(f"iteration {iteration}"):
        pending = parts.reward_computer.start(plan, prompts) if selection is None else selection
    value_A = last_value_N = None
    if parts.critic is not None and config.critic_is_inferred:
        value_A, last_value_N = score_values(parts.critic, plan.batches)
    policies = score_policies(config, parts.scorer, parts.actor, parts.reference, plan)
    # 2. Wait for the rewards. Dropped responses are masked alike in scoring and update, or bits would differ.
    with locate_reward_errors(f"iteration {iteration}"):
        all_rewards = pending.finish()
        require_one_score(all_rewards)
    rewards = all_rewards.select(plan.rank_assignment[plan.rank])
    if bool(all_rewards.dropped_N.any()):
        plan = plan.with_masked(rewards.dropped_N)
        policies = score_policies(config, parts.scorer, parts.actor, parts.reference, plan)
    # 3. Check what losses and KL will receive.
    old_A, entropy_A, ref_A = policies
    streams = {"actor": old_A, "reference": ref_A} | ({} if value_A is None else {"critic": value_A})
    check_logprobs(iteration, plan, prompts, parts.roles, cluster, **streams)
    return Inference(plan, all_rewards, rewards, old_A, entropy_A, ref_A, value_A, last_value_N)
