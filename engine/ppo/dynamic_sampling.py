"""Dynamic sampling: prompts whose responses all have the same score are left out, and others are drawn.

Source: DAPO, Yu et al. 2025, arXiv:2503.14476. Scores decide, so inference by actor, reference and critic comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.ppo.advantages.groups import Groups
from icegrt.ppo.batch_plan import plan_batches, truncated_mask
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.scores import total_scores
from icegrt.rollout.types import Response

if TYPE_CHECKING:
    from icegrt.ppo.setup import PPOComponents


@dataclass(frozen=True)
class Selection:
    """The prompts of an iteration with their responses and scores, in the order in which they were drawn.

    Attributes:
        prompts: of which each response's `prompt_index` is an index.
        responses: of all ranks.
        rewards: of the responses, in their order.
        rounds: number of draws.
        skipped: prompts that were left out.
        filled: prompts without a spread of scores that are here, because the rounds were used up.
    """

    prompts: list[Prompt]
    responses: list[Response]
    rewards: RewardOutputs
    rounds: int
    skipped: int
    filled: int

    def finish(self) -> RewardOutputs:
        """Return the rewards, as scores that are on their way do (`PendingRewards`)."""
        return self.rewards

    def shortage(self, config: PPOConfig) -> str:
        """Return the warning that the rounds were used up."""
        return (
            f"after ppo.dynamic_sampling_max_rounds={config.dynamic_sampling_max_rounds} draws {self.filled} of "
            f"{config.prompts_per_iteration} prompts have responses of one score each; they fill the iteration (metric "
            "filled_prompts). Raise it, or add prompts that are neither too easy nor too hard"
        )

    @property
    def figures(self) -> dict[str, int]:
        """Fields of the metrics."""
        return {"sampling_rounds": self.rounds, "skipped_prompts": self.skipped, "filled_prompts": self.filled}


@dataclass(frozen=True)
class _Group:
    prompt: Prompt
    responses: list[Response]
    rewards: RewardOutputs


def select_prompts(
    config: PPOConfig,
    draw: Callable[[int], list[Prompt]],
    roll_out: Callable[[list[Prompt], int], list[Response]],
    score: Callable[[list[Response], list[Prompt]], tuple[RewardOutputs, Tensor]],
) -> Selection:
    """Draw prompts until `prompts_per_iteration` of them have responses with different scores. Collective.

    A round draws as many as are missing. After `dynamic_sampling_max_rounds` the first of the prompts that were left
    out fill the iteration, so that its size and the mean of its loss are always those of the configuration. A response
    that was dropped is no response; a prompt with one left is left out.

    Args:
        config: of the run.
        draw: returns the next prompts.
        roll_out: returns the responses to the prompts of a round, which is counted from 0.
        score: returns the rewards of responses, in their order, and the numbers to compare, [N].
    """
    chosen: list[_Group] = []
    without_spread: list[_Group] = []
    rounds = 0
    while len(chosen) < config.prompts_per_iteration and rounds < config.dynamic_sampling_max_rounds:
        prompts = draw(config.prompts_per_iteration - len(chosen))
        responses = roll_out(prompts, rounds)
        rewards, score_N = score(responses, prompts)
        prompt_N = torch.tensor([r.prompt_index for r in responses], dtype=torch.int64)
        has_spread = Groups(score_N.double(), prompt_N, ~rewards.dropped_N, len(prompts)).has_spread_G.tolist()
        for index, prompt in enumerate(prompts):
            members = [n for n, r in enumerate(responses) if r.prompt_index == index]
            group = _Group(prompt, [responses[n] for n in members], rewards.select(members))
            (chosen if has_spread[index] else without_spread).append(group)
        rounds += 1
    filled = config.prompts_per_iteration - len(chosen)
    groups = [*chosen, *without_spread[:filled]]
    return _selection(groups, rounds, len(without_spread) - filled, filled)


def _selection(groups: Sequence[_Group], rounds: int, skipped: int, filled: int) -> Selection:
    responses = [replace(r, prompt_index=i) for i, group in enumerate(groups) for r in group.responses]
    rewards = RewardOutputs.concatenate([group.rewards for group in groups])
    return Selection([group.prompt for group in groups], responses, rewards, rounds, skipped, filled)


def compare_scores(
    config: PPOConfig, parts: PPOComponents, cluster: Cluster, responses: Sequence[Response], prompts: Sequence[Prompt]
) -> tuple[RewardOutputs, Tensor]:
    """Return the rewards of sampled responses, and their total scores with token rewards, [N] float64. Collective.

    All sources of reward score. The normalizers take all responses that are scored, as the policy samples them, before
    they are applied.

    Args:
        config: of the run.
        parts: reward computer and normalizers are used.
        cluster: the ranks.
        responses: of all ranks.
        prompts: response r answers `prompts[r.prompt_index]`.
    """
    plan = plan_batches(responses, config.token_budget, minibatch_by=config.minibatch_by, cluster=cluster)
    rewards = parts.reward_computer(plan, prompts)
    local = rewards.select(plan.rank_assignment[plan.rank])
    parts.normalizers.observe(local.models, ~local.dropped_N, cluster.device, cluster.data_group)
    scores = total_scores(
        config,
        parts.normalizers,
        rewards.models,
        rewards.source_total_N,
        truncated_mask(responses),
        rewards.dropped_N,
        lengths_N=torch.tensor([len(r.tokens) for r in responses]),
    )
    score_N, token_reward_A = scores.total_N.double(), rewards.token_reward_A
    if token_reward_A is not None:
        parts_A = token_reward_A.double().split([len(r.tokens) for r in responses])
        score_N = score_N + torch.stack([x.sum() for x in parts_A])
    return rewards, score_N
