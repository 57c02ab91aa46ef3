"""Scores, KL penalty and advantages: from the inference of an iteration to the experience that the update reads."""

from __future__ import annotations

from icegrt.config import PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.ppo.corrections import rollout_logprobs
from icegrt.ppo.experience import Experience, compute_advantages
from icegrt.ppo.inference import Inference
from icegrt.ppo.loss_weights import loss_weights, right_responses
from icegrt.ppo.scores import RunningScoreNormalizers, Scores, total_scores


def shape_scores(
    config: PPOConfig, normalizers: RunningScoreNormalizers, inference: Inference, cluster: Cluster, *, observe: bool
) -> Scores:
    """Normalise the scores of this rank's responses and add them up. Collective if `observe`.

    Args:
        config: of the run.
        normalizers: one per reward model.
        inference: of the iteration.
        cluster: the ranks.
        observe: take the scores into the running moments first; with dynamic sampling they are there already.
    """
    rewards, plan = inference.rewards, inference.plan
    if observe:
        normalizers.observe(rewards.models, ~rewards.dropped_N, cluster.device, cluster.data_group)
    return total_scores(
        config,
        normalizers,
        rewards.models,
        rewards.source_total_N,
        plan.truncated_N,
        rewards.dropped_N,
        lengths_N=plan.cu_actions.diff(),
    )


def shape_experience(
    config: PPOConfig, shaping: PPOConfig, kl_coef: float, inference: Inference, scores: Scores, cluster: Cluster
) -> Experience:
    """Form rewards and advantages of this rank's responses, and the factors of their losses. Collective.

    Args:
        config: of the run.
        shaping: of the advantages and returns; in value pretraining another one than `config`.
        kl_coef: of the KL penalty.
        inference: of the iteration.
        scores: of this rank's responses.
        cluster: the ranks.
    """
    plan, rewards, old_A = inference.plan, inference.rewards, inference.old_logprob_A
    shaped = compute_advantages(
        shaping,
        kl_coef,
        plan,
        scores,
        old_A,
        inference.ref_logprob_A,
        inference.value_A,
        inference.last_value_N,
        rewards.token_reward_A,
    )
    moments = shaped.moments.reduce(cluster.data_group)
    rollout_A = rollout_logprobs(plan, cluster.device)
    positive_N = right_responses(config, rewards.function_N, scores.total_N)
    weights = loss_weights(config, plan, old_A, rollout_A, positive_N, cluster)
    streams = (old_A, inference.entropy_A, inference.ref_logprob_A, inference.value_A)
    return Experience(plan, scores, *streams, shaped, moments, rollout_A, weights, shaping.has_own_returns)
