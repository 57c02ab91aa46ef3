"""The metrics of an iteration, and its responses as rows of `rollouts/`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.kernels import Moments, masked_moments
from icegrt.metrics import Evaluation, PPOStep
from icegrt.metrics.statistics import has_spread
from icegrt.packing.transfer import copy_to_device
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.corrections import effective_share, rollout_logprobs
from icegrt.ppo.dynamic_sampling import Selection
from icegrt.ppo.experience import Experience
from icegrt.ppo.losses import PolicyNLLStats, ReducedPassStats
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.update import UpdateOutcome, mean_grad_norm
from icegrt.utils.files import json_safe

# Phases that are not part of an iteration's throughput.
_NOT_THE_ITERATION = ("evaluate", "checkpoint")


def ppo_step(
    iteration: int,
    experience: Experience,
    rewards: RewardOutputs,
    outcome: UpdateOutcome,
    kl_coef: float,
    seconds: dict[str, float],
    evaluation: Evaluation | None,
    cluster: Cluster,
    selection: Selection | None = None,
) -> PPOStep:
    """Return the metrics of an iteration, reduced over data-parallel ranks. Collective.

    Dropped responses count in the metrics of tokens and truncation only.

    Args:
        iteration: from 1.
        experience: this rank's responses.
        rewards: scores of this rank's responses.
        outcome: of the update.
        kl_coef: the coefficient that the iteration used.
        seconds: by phase.
        evaluation: if there was one in this iteration.
        cluster: the ranks.
        selection: of the prompts, with dynamic sampling.
    """
    # Figures stay on the device until all are computed.
    figures = fetch(
        {
            **score_metrics(experience, rewards, cluster),
            **policy_metrics(experience, rewards, outcome, cluster),
            **correction_metrics(experience, outcome, cluster),
            **critic_metrics(experience, outcome, cluster),
            **throughput_metrics(experience.plan, seconds, cluster),
        }
    )
    return PPOStep(
        iteration=iteration,
        kl_coef=kl_coef,
        **{name: float(x) if isinstance(x, Tensor) else x for name, x in figures.items()},
        **source_metrics(rewards, cluster.data_group),
        reward_source_seconds=rewards.source_seconds,
        reward_wait_seconds=rewards.wait_seconds,
        skipped_steps=outcome.skipped,
        empty_steps=outcome.empty,
        **({} if selection is None else selection.figures),
        evaluation=evaluation,
    )


def score_metrics(experience: Experience, rewards: RewardOutputs, cluster: Cluster) -> dict[str, Any]:
    """Return the fields of scores and rewards, per response."""
    kept_N, function_N = ~rewards.dropped_N, rewards.function_N
    reward_N = _sum_by_response(experience.shaped.reward_A, experience.plan.cu_actions.to(cluster.device))
    total = moments_of(experience.scores.total_N, kept_N, cluster)
    return {
        "score_mean": total.mean,
        "score_std": total.variance.sqrt(),
        "reward_model_score_mean": _mean(rewards.reward_model_N, kept_N, cluster),
        "function_score_mean": _mean(function_N, None if function_N is None else kept_N & ~function_N.isnan(), cluster),
        "reward_mean": _mean(reward_N, kept_N, cluster),
        "overlong_penalty_mean": _mean(experience.scores.overlong_N, kept_N, cluster),
    }


def policy_metrics(
    experience: Experience, rewards: RewardOutputs, outcome: UpdateOutcome, cluster: Cluster
) -> dict[str, Any]:
    """Return the fields of the actor: distance from the reference, entropy, advantages, and its update."""
    mask_A = experience.plan.mask_A
    counted_A = None if mask_A is None else mask_A.to(cluster.device)
    stats = _reduced(outcome.policy_stats, cluster) if outcome.policy_stats is not None else None
    ptx_loss_sum, ptx_tokens, left_responses = cluster.all_reduce_sum(
        [outcome.ptx_stats.loss_sum, outcome.ptx_stats.tokens, outcome.left_responses]
    )
    rollout_A = experience.rollout_logprob_A
    if rollout_A is None:
        rollout_A = rollout_logprobs(experience.plan, cluster.device)
    entropy, gap_mean, gap_max = _mean(experience.entropy_A, counted_A, cluster), None, None
    if entropy is None:
        # No inference pass of the actor: the mean of -log p over its samples estimates the entropy without bias.
        entropy = _mean(-rollout_A, counted_A, cluster)
    else:
        gap_A = (rollout_A - experience.old_logprob_A).abs()
        gap_mean = _mean(gap_A, counted_A, cluster)
        gap_max = _maximum(gap_A if counted_A is None else gap_A * counted_A, cluster)
    # A clipped token has an advantage, so that none of those that left is one. A masked one may have none.
    per_clip_token = _per_read_token if experience.weights.correction == "dis" else _per_token
    return {
        "kl_nats_per_response": _mean(experience.shaped.kl_N, ~rewards.dropped_N, cluster),
        "entropy_nats_per_token": entropy,
        "clip_fraction": per_clip_token(stats, "clipped_sum"),
        # Infinite extremes are those of no token: all advantages are 0.
        "ratio_min": torch.where(stats.ratio_min == torch.inf, 1.0, stats.ratio_min) if stats else 1.0,
        "ratio_max": torch.where(stats.ratio_max == -torch.inf, 1.0, stats.ratio_max) if stats else 1.0,
        "approx_kl_nats_per_token": _per_read_token(stats, "kl_old_new_sum"),
        "policy_loss": _per_token(stats, "loss_sum"),
        "ptx_loss": ptx_loss_sum / ptx_tokens if ptx_tokens else None,
        "advantage_mean": experience.moments.mean,
        "advantage_std": experience.moments.variance.sqrt(),
        "zero_advantage_fraction": left_responses / len(experience.plan.responses),
        "grad_norm_actor": mean_grad_norm(outcome.actor) if outcome.actor else 0.0,
        "lr_actor": outcome.actor[-1].lr if outcome.actor else 0.0,
        "rollout_logprob_gap_mean": gap_mean,
        "rollout_logprob_gap_max": gap_max,
        "positive_nll": _positive_nll(stats),
    }


def correction_metrics(experience: Experience, outcome: UpdateOutcome, cluster: Cluster) -> dict[str, Any]:
    """Return the fields of the correction by the rollout's log-probs; none without a correction.

    tis: of the weights before the update, over all counted tokens. dis: of the ratios in all steps of the update, over
    the tokens that its passes read; none if they read no token.
    """
    weights, mask_A = experience.weights, experience.plan.mask_A
    if weights.correction == "tis":
        assert weights.ratio_A is not None and weights.truncated_A is not None
        counted_A = None if mask_A is None else mask_A.to(cluster.device)
        ratio_A, truncated_A = weights.ratio_A, weights.truncated_A
        truncated = fetch(moments_of(truncated_A, counted_A, cluster))
        return {
            "correction_ratio_mean": _mean(ratio_A, counted_A, cluster),
            "correction_ratio_max": _maximum(ratio_A if counted_A is None else ratio_A * counted_A, cluster),
            "correction_fraction": _mean((ratio_A > truncated_A).float(), counted_A, cluster),
            "correction_sample_share": effective_share(float(truncated.mean), float(truncated.variance)),
        }
    if weights.correction == "dis" and outcome.policy_stats is not None:
        stats = _reduced(outcome.policy_stats, cluster)
        if not float(_read_tokens(stats)):
            return {}
        return {
            "correction_ratio_mean": _per_read_token(stats, "ratio_sum"),
            "correction_ratio_max": stats.ratio_max,
            "correction_fraction": _per_read_token(stats, "clipped_sum"),
        }
    return {}


def critic_metrics(experience: Experience, outcome: UpdateOutcome, cluster: Cluster) -> dict[str, Any]:
    """Return the fields of the critic: its loss, its steps, and the variance of the returns that it explains.

    Without a critic there are none.
    """
    if outcome.value_stats is None:
        return {}
    stats, shaped = _reduced(outcome.value_stats, cluster), experience.shaped
    mask_A = experience.plan.mask_A if shaped.value_mask_A is None else shaped.value_mask_A
    # What the value lacks of a return is the advantage, unless returns are of their own.
    errors = experience.moments
    if experience.own_returns:
        assert experience.value_A is not None
        errors = moments_of(shaped.return_A - experience.value_A, mask_A, cluster)
    returns, errors = fetch((moments_of(shaped.return_A, mask_A, cluster), errors))
    explained = 0.0
    if has_spread(float(returns.mean), float(returns.variance.sqrt())):
        explained = 1.0 - float(errors.variance / returns.variance)
    return {
        "value_loss": _per_token(stats, "loss_sum"),
        "value_explained_variance": explained,
        "grad_norm_critic": mean_grad_norm(outcome.critic),
        "lr_critic": outcome.critic[-1].lr,
    }


def throughput_metrics(plan: BatchPlan, seconds: dict[str, float], cluster: Cluster) -> dict[str, Any]:
    """Return the fields of response lengths, padding and time."""
    lengths = fetch(moments_of(plan.cu_actions.diff(), None, cluster))
    response_tokens = round(float(lengths.mean) * int(lengths.count))
    padding, computed = cluster.all_reduce_sum([plan.tail_tokens, plan.n_tokens])
    elapsed = sum(s for phase, s in seconds.items() if phase not in _NOT_THE_ITERATION)
    return {
        "response_tokens_mean": float(lengths.mean),
        "truncated_fraction": _mean(plan.truncated_N, None, cluster),
        "response_tokens": response_tokens,
        "response_tokens_per_second": response_tokens / elapsed,
        "padding_fraction": padding / computed,
        "seconds_by_phase": seconds,
    }


def source_metrics(rewards: RewardOutputs, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Return the fields by source of reward, and the numbers of errors and dropped responses. Collective.

    The names of a source's metrics may differ between ranks, so ranks exchange their moments by name.
    """
    local_moments = {
        source: {name: masked_moments(torch.tensor(x, dtype=torch.float64)) for name, x in values.items()}
        for source, values in rewards.values().items()
    }
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, (local_moments, rewards.errors(), int(rewards.dropped_N.sum())), group=group)
    merged: dict[str, dict[str, Any]] = {}
    for rank_moments, _, _ in by_rank:
        for source, values in rank_moments.items():
            totals = merged.setdefault(source, {})
            for name, moments in values.items():
                totals[name] = totals[name].merge(moments) if name in totals else moments
    sources: dict[str, dict[str, float]] = {}
    for source, values in merged.items():
        figures = sources[source] = {}
        for name, moments in sorted(values.items(), key=lambda item: (item[0] != "score", item[0])):
            if float(moments.count):
                figures[f"{name}_mean"], figures[f"{name}_std"] = float(moments.mean), float(moments.variance.sqrt())
        if source in rewards.errors():
            figures["errors"] = sum(errors[source] for _, errors, _ in by_rank)
    for model in rewards.models[1:]:
        sources[model.name]["weight"] = model.weight
    return {
        "sources": sources,
        "reward_errors": sum(sum(errors.values()) for _, errors, _ in by_rank),
        "dropped_responses": sum(dropped for _, _, dropped in by_rank),
    }


def moments_of(x: Tensor, mask: Tensor | None, cluster: Cluster) -> Moments:
    """Return the fp64 moments over all ranks of the entries under `mask` (None: all entries). Collective.

    Args:
        x: any shape and dtype, on the host or the device, where the moments are computed.
        mask: bool, of the shape of `x`.
        cluster: the ranks.
    """
    device = cluster.device
    return masked_moments(x.to(device).double(), None if mask is None else mask.to(device), group=cluster.data_group)


def _reduced(stats: Any, cluster: Cluster) -> Any:
    """Return statistics over all ranks; they were fetched to the host, and are reduced on the device."""
    values = copy_to_device(vars(stats), cluster.device)
    return replace(stats, **values).reduce(cluster.data_group)


def _mean(x: Tensor | None, mask: Tensor | None, cluster: Cluster) -> Tensor | None:
    """Return the mean over all ranks of the entries under `mask` (None: all entries); None without a tensor."""
    return None if x is None else moments_of(x, mask, cluster).mean


def _maximum(x: Tensor, cluster: Cluster) -> Tensor:
    """Return the largest entry over all ranks. Entries are at least 0; a rank may have none."""
    largest = x.max() if x.numel() else x.new_zeros(())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=cluster.data_group)
    return largest


def _per_token(stats: Any, name: str) -> Tensor | float:
    """Return a sum of `stats` per token that counts; 0 without any."""
    return 0.0 if stats is None else torch.where(stats.count > 0, getattr(stats, name) / stats.count.clamp(min=1), 0.0)


def _read_tokens(stats: Any) -> Tensor:
    """Return the number of counted tokens that the passes of `stats` read."""
    count: Tensor = stats.count
    return count - stats.left_tokens if isinstance(stats, ReducedPassStats) else count


def _per_read_token(stats: Any, name: str) -> Tensor | float:
    """Return a sum of `stats` per counted token that the passes read; 0 without any."""
    if stats is None:
        return 0.0
    count = _read_tokens(stats)
    return torch.where(count > 0, getattr(stats, name) / count.clamp(min=1), 0.0)


def _positive_nll(stats: Any) -> Tensor | None:
    """Return the mean of -log p over the tokens of right responses; None without that loss or such a response."""
    if not isinstance(stats, PolicyNLLStats) or not float(stats.nll_tokens):
        return None
    return stats.nll_sum / stats.nll_tokens


def _sum_by_response(x_A: Tensor, cu_actions: Tensor) -> Tensor:
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), x_A.double().cumsum(0)])
    return ends[cu_actions[1:].long()] - ends[cu_actions[:-1].long()]


def rollout_rows(
    iteration: int, seed: int, experience: Experience, rewards: RewardOutputs, cluster: Cluster
) -> Iterator[dict[str, Any]]:
    """Return one row per response of all ranks: text, ids, finish reason, scores, KL, advantages, log-probs.

    A collective, after which any thread may form the rows. `rewards`: scores of all ranks' responses.
    """
    plan, function_N = experience.plan, rewards.function_N
    local_kl_N, advantage_A = fetch((experience.shaped.kl_N, experience.shaped.advantage_A))
    total_N = plan.all_gather_sequences(experience.scores.total_N)
    kl_N = plan.all_gather_sequences(local_kl_N)
    advantages = plan.all_gather_actions(advantage_A)
    return (
        {
            "iteration": iteration,
            "seed": seed,
            "sequence_id": response.sequence_id,
            "where": sample.where,
            "sample": response.sample,
            "prompt": _as_json(sample.row.get("prompt", sample.row.get("messages"))),
            "text": sample.text,
            "finish_reason": response.finish_reason,
            "score": _number(total_N, n),
            "reward_model_score": _number(rewards.reward_model_N, n),
            "function_score": _number(function_N, n),
            **source_columns(rewards, n),
            "kl_nats": _number(kl_N, n),
            "prompt_ids": response.prompt,
            "response_ids": response.tokens,
            "advantages": [_short(x) for x in advantages[n].tolist()],
            "logprobs": [_short(x) for x in response.logprobs],
        }
        for n, (response, sample) in enumerate(zip(plan.responses, rewards.samples, strict=True))
    )


def source_columns(rewards: RewardOutputs, n: int) -> dict[str, Any]:
    """Return the scores and errors of response n by source, the first reward model aside."""
    columns: dict[str, dict[str, Any]] = {
        m.name: {"score": _number(m.score_N, n), "weight": m.weight, "error": None} for m in rewards.models[1:]
    }
    for source in rewards.sources:
        result, error = source.results[n], source.errors[n]
        column = {"score": result.score, "weight": source.weight, "error": error}
        if result.metrics:
            column["metrics"] = _as_json(result.metrics)
        if result.token_rewards_A is not None:
            column["token_rewards"] = [_short(x) for x in result.token_rewards_A]
        columns[source.name] = column
    return {"sources": columns, "dropped": bool(rewards.dropped_N[n])}


def _as_json(value: Any) -> Any:
    """Return `value` as JSON types. What JSON has no type for, such as a date, becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    try:
        return json_safe(value)
    except (TypeError, ValueError):
        return str(value)


def _number(x_N: Tensor | None, n: int) -> float | None:
    return None if x_N is None or bool(x_N[n].isnan()) else float(x_N[n])


def _short(x: float) -> float:
    return float(f"{x:.6g}") if math.isfinite(x) else x
