"""The records that iterating a trainer yields: one dataclass per stage."""

from __future__ import annotations

import dataclasses
from typing import Any

PHASES = ("rollout", "plan", "score", "shape", "update", "evaluate", "checkpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Answers to the held-out prompts, scored. The first fields are of sampled answers, `greedy_*` of greedy ones."""

    iteration: int
    prompts: int
    score_mean: float
    reward_model_score_mean: float | None = None
    function_score_mean: float | None = None
    kl_nats_per_response: float
    response_tokens_mean: float
    truncated_fraction: float
    distinct_fraction: float
    greedy_score_mean: float | None = None
    greedy_reward_model_score_mean: float | None = None
    greedy_function_score_mean: float | None = None
    greedy_response_tokens_mean: float | None = None
    greedy_truncated_fraction: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOStep:
    """One PPO iteration, over all ranks. Means are per response where the name does not say `per_token`."""

    iteration: int
    # What the responses were worth.
    score_mean: float  # total score per response, before clipping
    reward_model_score_mean: float | None = None  # the first one's, raw, before scaling; None without a reward model
    function_score_mean: float | None = None  # None without a reward function
    score_std: float
    reward_mean: float  # score as clipped and scaled, minus the KL penalty
    # How far the actor is from the reference, and how sure of itself.
    kl_nats_per_response: float
    kl_coef: float
    entropy_nats_per_token: float
    # The update.
    clip_fraction: float
    ratio_min: float
    ratio_max: float
    approx_kl_nats_per_token: float  # from the policy that sampled to the updated one
    policy_loss: float
    value_loss: float
    value_explained_variance: float
    ptx_loss: float | None = None
    advantage_mean: float  # before whitening
    advantage_std: float
    grad_norm_actor: float
    grad_norm_critic: float
    lr_actor: float
    lr_critic: float
    skipped_steps: int = 0  # optimizer steps skipped in this iteration: loss or gradient not finite
    empty_steps: int = 0  # optimizer steps not taken: every response of their minibatch was dropped
    # The responses and what they cost.
    response_tokens_mean: float
    truncated_fraction: float  # finish reason, never inferred from a length
    response_tokens: int
    response_tokens_per_second: float  # over the whole iteration, evaluation and checkpoint left out
    rollout_logprob_gap_max: float  # |log-prob in rollout - log-prob in scoring|, nats, the largest of any token
    padding_fraction: float  # alignment tail over all tokens
    # By source of reward: score_mean, score_std, errors, and metrics/NAME_mean, _std for what it gave beside the score;
    # of reward models the raw score, and the weight of those beyond the first.
    sources: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    reward_errors: int = 0  # responses that a source failed on, counted once for each source
    dropped_responses: int = 0  # left out of the update because a source failed on them
    seconds_by_phase: dict[str, float] = dataclasses.field(default_factory=dict)  # keys: PHASES
    evaluation: Evaluation | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTStep:
    """One optimizer step of supervised fine-tuning; losses in nats per response token."""

    step: int
    epoch: float
    loss: float
    heldout_loss: float | None = None
    tokens: int
    tokens_per_second: float
    lr: float
    grad_norm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardStep:
    """One optimizer step of the reward model; losses in nats per pair, accuracies over untied pairs."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    heldout_loss: float | None = None
    heldout_accuracy: float | None = None
    lr: float
    grad_norm: float


Step = PPOStep | SFTStep | RewardStep | Evaluation


KINDS = {PPOStep: "ppo", SFTStep: "sft", RewardStep: "reward", Evaluation: "evaluation"}


def step_from_row(row: dict[str, Any]) -> Step:
    """The step that a row of `read_metrics` was written from; keys that the class does not know are left out."""
    cls = next(c for c, kind in KINDS.items() if kind == row["kind"])
    names = {field.name for field in dataclasses.fields(cls)}
    values = {k: v for k, v in row.items() if k in names}
    if values.get("evaluation") is not None:
        values["evaluation"] = step_from_row({"kind": "evaluation", **values["evaluation"]})
    return cls(**values)
