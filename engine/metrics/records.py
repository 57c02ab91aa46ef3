"""The metrics records that a trainer yields: one dataclass per stage."""

from __future__ import annotations

import dataclasses
from typing import Any

PHASES = ("rollout", "plan", "score", "shape", "update", "evaluate", "checkpoint")
PHASE_LABELS = {"plan": "batching", "score": "inference", "shape": "advantages", "evaluate": "evaluation"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of answers to the held-out prompts: of sampled answers, and with `greedy_*` of greedy ones.

    A field is None if it does not apply: no reward model, no function, or no greedy answers.
    """

    iteration: int
    """The iteration after which it ran; 0: before training."""
    prompts: int
    """Number of held-out prompts."""
    score_mean: float
    """Mean total score per response, normalized by the moments of the run's first evaluation."""
    reward_model_score_mean: float | None = None
    """Mean score of the first reward model, before normalization."""
    function_score_mean: float | None = None
    """Mean task score: the score of the first function or HTTP scorer."""
    kl_nats_per_response: float
    """KL from the reference, estimated on the sampled tokens."""
    response_tokens_mean: float
    """Mean length of a response in tokens."""
    truncated_fraction: float
    """Fraction of responses that reached the length limit without EOS."""
    distinct_fraction: float
    """Number of distinct texts over the number of responses."""
    greedy_score_mean: float | None = None
    greedy_reward_model_score_mean: float | None = None
    greedy_function_score_mean: float | None = None
    greedy_response_tokens_mean: float | None = None
    greedy_truncated_fraction: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOStep:
    """Metrics of one PPO iteration, over all ranks. A mean is per response unless its name has `per_token`."""

    iteration: int
    """Number of the iteration, from 1."""

    # Scores and rewards.
    score_mean: float
    """Mean total score per response that training pays: normalized by the running moments."""
    reward_model_score_mean: float | None = None
    """Mean score of the first reward model, before normalization; None without a reward model."""
    function_score_mean: float | None = None
    """Mean task score: the score of the first function or HTTP scorer; None without one."""
    score_std: float
    """Standard deviation of the total score."""
    overlong_penalty_mean: float | None = None
    """Mean soft penalty of long responses, subtracted from the score; None without it."""
    reward_mean: float
    """Mean over responses of the sum of their rewards: normalized, clipped score minus the KL penalty."""

    # Distance from the reference, and entropy.
    kl_nats_per_response: float
    """KL from the reference, estimated on the sampled tokens."""
    kl_coef: float
    """Coefficient of the KL penalty in this iteration."""
    entropy_nats_per_token: float
    """Mean entropy of the policy over response tokens."""

    # The update.
    clip_fraction: float
    """Fraction of response tokens whose policy ratio is clipped."""
    ratio_min: float
    """Smallest ratio of new to old probability of a token."""
    ratio_max: float
    """Largest ratio of new to old probability of a token."""
    approx_kl_nats_per_token: float
    """KL from the policy that sampled the responses to the updated policy."""
    policy_loss: float
    """Policy loss; `ppo.loss_aggregation` says of what it is the mean. Without positive-example and ptx losses."""
    positive_nll: float | None = None
    """Mean of -log p in nats over the tokens of right responses; None without the positive-example loss."""
    correction_ratio_mean: float | None = None
    """Mean ratio to the rollout's probability: of the old (tis) or the new one (dis); None without a correction."""
    correction_ratio_max: float | None = None
    """Largest such ratio."""
    correction_fraction: float | None = None
    """Fraction of tokens whose weight was capped (tis), or whose loss was masked of those that the pass read (dis)."""
    correction_sample_share: float | None = None
    """Effective sample size of the weights of tis over the number of tokens."""
    value_loss: float | None = None
    """Mean value loss over response tokens; None without a critic."""
    value_explained_variance: float | None = None
    """1 - var(returns - values) / var(returns); None without a critic."""
    ptx_loss: float | None = None
    """Mean ptx loss in nats per token; None without ptx data."""
    advantage_mean: float
    """Mean advantage before whitening."""
    advantage_std: float
    """Standard deviation of the advantages before whitening."""
    zero_advantage_fraction: float = 0.0
    """Fraction of the responses that left the actor's pass because their advantages are exactly 0."""
    grad_norm_actor: float
    """Global norm of the actor's gradient before clipping, mean over the optimizer steps."""
    grad_norm_critic: float | None = None
    """Global norm of the critic's gradient before clipping, mean over the optimizer steps; None without a critic."""
    lr_actor: float
    """Learning rate of the actor's last optimizer step."""
    lr_critic: float | None = None
    """Learning rate of the critic's last optimizer step; None without a critic."""
    skipped_steps: int = 0
    """Optimizer steps skipped because a loss or gradient was not finite."""
    empty_steps: int = 0
    """Optimizer steps without a response, as all of their minibatch were dropped."""
    pretraining: bool = False
    """Whether this was an iteration of value pretraining: the actor took no step, and returns are of lambda 1."""

    # Dynamic sampling.
    sampling_rounds: int = 1
    """Draws of prompts in this iteration."""
    skipped_prompts: int = 0
    """Prompts left out because all their responses had the same score."""
    filled_prompts: int = 0
    """Such prompts that were trained on after all, because the last round left too few others."""

    # The responses and their cost.
    response_tokens_mean: float
    """Mean length of a response in tokens."""
    truncated_fraction: float
    """Fraction of responses with finish reason "length"."""
    response_tokens: int
    """Number of response tokens."""
    response_tokens_per_second: float
    """Response tokens per second of the iteration, without evaluation and checkpoint."""
    rollout_logprob_gap_mean: float | None = None
    """Mean of |log-prob in rollout - log-prob in scoring| over tokens, in nats; None without a pass of the actor."""
    rollout_logprob_gap_max: float | None
    """The largest such difference of a token, in nats; None without a pass of the actor."""
    padding_fraction: float
    """Padding tokens at the ends of micro-batches over all tokens."""
    sources: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By reward source: score_mean, score_std and errors, and metrics/NAME_mean and _std of its further metrics.

    A reward model has its score before normalization, and its weight if it is not the first.
    """
    reward_errors: int = 0
    """Responses that a source failed on, counted once per source."""
    dropped_responses: int = 0
    """Responses dropped from the update because a source failed on them."""
    seconds_by_phase: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of each phase; the keys are `PHASES`. Phases follow each other."""
    reward_source_seconds: float = 0.0
    """Seconds of reward functions and HTTP scorers of rank 0, beside the inference of the models."""
    reward_wait_seconds: float = 0.0
    """Seconds that the models of rank 0 waited at the end of inference for the functions and scorers of all ranks."""
    evaluation: Evaluation | None = None
    """The evaluation after this iteration, if there was one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTStep:
    """Metrics of one optimizer step of supervised fine-tuning; losses in nats per response token."""

    step: int
    """Number of the step, from 1."""
    epoch: float
    """Passes over the blend so far."""
    loss: float
    """Mean loss over the response tokens of the batch."""
    heldout_loss: float | None = None
    """Mean loss on held-out data after this step; None between evaluations."""
    tokens: int
    """Tokens of the batch, prompts and padding included."""
    tokens_per_second: float
    """`tokens` per second of the step."""
    lr: float
    """Learning rate."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardStep:
    """Metrics of one optimizer step of the reward model; losses in nats per pair, accuracies over untied pairs."""

    step: int
    """Number of the step, from 1."""
    epoch: float
    """Passes over the prompts so far."""
    loss: float
    """Mean pairwise loss of the batch."""
    accuracy: float
    """Pairwise accuracy on the batch."""
    heldout_loss: float | None = None
    """Mean pairwise loss on held-out data after this step; None between evaluations."""
    heldout_accuracy: float | None = None
    """Pairwise accuracy on held-out data after this step; None between evaluations."""
    lr: float
    """Learning rate."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueStep:
    """Metrics of one optimizer step of value pretraining, over response tokens."""

    step: int
    """Number of the step, from 1."""
    epoch: float
    """Passes over the rollouts so far."""
    loss: float
    """Half the mean squared error of the values against the returns of the batch."""
    explained_variance: float
    """1 - var(returns - values) / var(returns) on the batch, before the step."""
    heldout_loss: float | None = None
    """The same loss on held-out rollouts after this step; None between evaluations."""
    heldout_explained_variance: float | None = None
    """Explained variance of held-out returns after this step; None between evaluations."""
    lr: float
    """Learning rate."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


Step = PPOStep | SFTStep | RewardStep | ValueStep | Evaluation
KINDS = {PPOStep: "ppo", SFTStep: "sft", RewardStep: "reward", ValueStep: "value", Evaluation: "evaluation"}


def step_from_row(row: dict[str, Any]) -> Step:
    """Return the record of a row of `read_metrics`. Keys that the class lacks are ignored."""
    cls = next(c for c, kind in KINDS.items() if kind == row["kind"])
    names = {field.name for field in dataclasses.fields(cls)}
    values = {k: v for k, v in row.items() if k in names}
    if values.get("evaluation") is not None:
        values["evaluation"] = step_from_row({"kind": "evaluation", **values["evaluation"]})
    return cls(**values)
