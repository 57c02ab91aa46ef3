"""An iteration in figures, and its responses as rows to read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.distributed.cluster import Cluster
from icegrt.kernels import masked_moments
from icegrt.metrics import Evaluation, PPOStep
from icegrt.ppo.experience import Experience
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.update import UpdateOutcome, mean_grad_norm
from icegrt.utils.files import JsonlWriter

_NOT_THE_ITERATION = ("evaluate", "checkpoint")


def ppo_step(
    iteration: int,
    experience: Experience,
    rewards: RewardOutputs,
    outcome: UpdateOutcome,
    kl_coef: float,
    seconds: dict[str, float],
    evaluation: Evaluation | None,
    group: dist.ProcessGroup,
) -> PPOStep:
    """The metrics of an iteration, reduced over `group` (the data-parallel ranks). Dropped responses count in those
    of tokens and truncation only."""
    plan, shaped, scores = experience.plan, experience.shaped, experience.scores
    kept_N, counted_A = ~rewards.dropped_N, plan.mask_A
    rollout_A = torch.tensor([x for r in plan.local_responses for x in r.logprobs])
    reward_N = _sum_by_response(shaped.reward_A, plan.cu_actions)
    tokens_N = plan.cu_actions.diff().double()
    truncated_N = torch.tensor([float(r.truncated) for r in plan.local_responses])
    means = _means(
        {
            "score": (scores.total_N, kept_N),
            "reward_model": (rewards.reward_model_N, None),
            "function": _with_known(rewards.function_N),
            "reward": (reward_N, kept_N),
            "kl": (shaped.kl_N, kept_N),
            "entropy": (experience.entropy_A, counted_A),
            "tokens": (tokens_N, None),
            "truncated": (truncated_N, None),
        },
        group,
    )
    policy = outcome.policy_stats.reduce(group) if outcome.policy_stats is not None else None
    value = outcome.value_stats.reduce(group)
    return_moments = masked_moments(shaped.return_A.double(), counted_A, group=group)
    unexplained = float(experience.moments.variance / return_moments.variance.clamp(min=1e-30))
    gap_A = (rollout_A - experience.old_logprob_A).abs()
    gap = _maximum(gap_A if counted_A is None else gap_A * counted_A, group)
    cluster = Cluster.current()
    padding, computed = cluster.all_reduce_sum([plan.tail_tokens, plan.n_tokens])
    ptx_loss, ptx_tokens = cluster.all_reduce_sum([outcome.ptx_loss_sum, outcome.ptx_tokens])
    elapsed = sum(s for phase, s in seconds.items() if phase not in _NOT_THE_ITERATION)
    count = int(means["tokens"][1])
    response_tokens = round(means["tokens"][0] * count)
    return PPOStep(
        iteration=iteration,
        score_mean=means["score"][0],
        reward_model_score_mean=means["reward_model"][0],
        function_score_mean=means["function"][0],
        score_std=float(masked_moments(scores.total_N.double(), kept_N, group=group).variance.sqrt()),
        reward_mean=means["reward"][0],
        kl_nats_per_response=means["kl"][0],
        kl_coef=kl_coef,
        entropy_nats_per_token=means["entropy"][0],
        clip_fraction=_ratio(policy, "clipped_sum"),
        ratio_min=float(policy.ratio_min) if policy else 1.0,
        ratio_max=float(policy.ratio_max) if policy else 1.0,
        approx_kl_nats_per_token=_ratio(policy, "kl_old_new_sum"),
        policy_loss=_ratio(policy, "loss_sum"),
        value_loss=_ratio(value, "loss_sum"),
        value_explained_variance=1.0 - unexplained if float(return_moments.variance) > 0 else 0.0,
        ptx_loss=ptx_loss / ptx_tokens if ptx_tokens else None,
        advantage_mean=float(experience.moments.mean),
        advantage_std=float(experience.moments.variance.sqrt()),
        grad_norm_actor=mean_grad_norm(outcome.actor) if outcome.actor else 0.0,
        grad_norm_critic=mean_grad_norm(outcome.critic),
        lr_actor=outcome.actor[-1].lr if outcome.actor else 0.0,
        lr_critic=outcome.critic[-1].lr,
        skipped_steps=outcome.skipped,
        empty_steps=outcome.empty,
        response_tokens_mean=means["tokens"][0],
        truncated_fraction=means["truncated"][0],
        response_tokens=response_tokens,
        response_tokens_per_second=response_tokens / elapsed,
        rollout_logprob_gap_max=gap,
        padding_fraction=padding / computed,
        **source_figures(rewards, group),
        seconds_by_phase=seconds,
        evaluation=evaluation,
    )


def source_figures(rewards: RewardOutputs, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """`sources`, `reward_errors` and `dropped_responses` of a `PPOStep`, over all ranks of `group`.

    A source's metrics may have other names on another rank, so ranks exchange what they have by name.
    """
    ours = {
        source: {name: masked_moments(torch.tensor(x, dtype=torch.float64)) for name, x in values.items()}
        for source, values in rewards.values().items()
    }
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (ours, rewards.errors(), int(rewards.dropped_N.sum())), group=group)
    merged: dict[str, dict[str, Any]] = {}
    for theirs, _, _ in found:
        for source, values in theirs.items():
            into = merged.setdefault(source, {})
            for name, moments in values.items():
                into[name] = into[name].merge(moments) if name in into else moments
    sources: dict[str, dict[str, float]] = {}
    for source, values in merged.items():
        figures = sources[source] = {}
        for name, moments in sorted(values.items(), key=lambda item: (item[0] != "score", item[0])):
            if float(moments.count):
                figures[f"{name}_mean"], figures[f"{name}_std"] = float(moments.mean), float(moments.variance.sqrt())
        if source in rewards.errors():
            figures["errors"] = sum(errors[source] for _, errors, _ in found)
    for model in rewards.models[1:]:
        sources[model.name]["weight"] = model.weight
    return {
        "sources": sources,
        "reward_errors": sum(sum(errors.values()) for _, errors, _ in found),
        "dropped_responses": sum(dropped for _, _, dropped in found),
    }


def _means(
    parts: dict[str, tuple[Tensor | None, Tensor | None]], group: dist.ProcessGroup
) -> dict[str, tuple[float | None, float]]:
    moments = {
        name: masked_moments(x.double(), mask, group=group) for name, (x, mask) in parts.items() if x is not None
    }
    return {n: (float(moments[n].mean), float(moments[n].count)) if n in moments else (None, 0.0) for n in parts}


def _with_known(x_N: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if x_N is None else (x_N, ~x_N.isnan())


def _maximum(x: Tensor, group: dist.ProcessGroup) -> float:
    """The largest entry over all ranks, some of which may have none; entries are at least 0."""
    largest = x.max() if x.numel() else torch.zeros(())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return float(largest)


def _ratio(stats: Any, name: str) -> float:
    return float(getattr(stats, name) / stats.count) if stats is not None and float(stats.count) else 0.0


def _sum_by_response(x_A: Tensor, cu_actions: Tensor) -> Tensor:
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), x_A.double().cumsum(0)])
    return ends[cu_actions[1:].long()] - ends[cu_actions[:-1].long()]


def write_rollouts(path: Path, iteration: int, seed: int, experience: Experience, rewards: RewardOutputs) -> None:
    """One row per response: text, ids, finish reason, score parts, KL, advantages, and what it was sampled with.

    A collective that rank 0 writes for. `rewards`: of everyone's responses.
    """
    plan, function_N = experience.plan, rewards.function_N
    total_N = plan.all_gather_sequences(experience.scores.total_N)
    kl_N = plan.all_gather_sequences(experience.shaped.kl_N)
    advantages = plan.all_gather_actions(experience.shaped.advantage_A)
    if not Cluster.current().is_main:
        return
    with JsonlWriter(path) as writer:
        for n, (response, sample) in enumerate(zip(plan.responses, rewards.samples, strict=True)):
            writer.write(
                {
                    "iteration": iteration,
                    "seed": seed,
                    "sequence_id": response.sequence_id,
                    "where": sample.where,
                    "sample": response.sample,
                    "prompt": sample.row.get("prompt", sample.row.get("messages")),
                    "text": sample.text,
                    "finish_reason": response.finish_reason,
                    "score": _number(total_N, n),
                    "reward_model_score": _number(rewards.reward_model_N, n),
                    "function_score": _number(function_N, n),
                    **_said(rewards, n),
                    "kl_nats": _number(kl_N, n),
                    "prompt_ids": response.prompt,
                    "response_ids": response.tokens,
                    "advantages": [_short(x) for x in advantages[n].tolist()],
                    "logprobs": [_short(x) for x in response.logprobs],
                }
            )


def _said(rewards: RewardOutputs, n: int) -> dict[str, Any]:
    """What each source said of response n beside the first reward model, errors in words."""
    said: dict[str, dict[str, Any]] = {
        m.name: {"score": _number(m.score_N, n), "weight": m.weight, "error": None} for m in rewards.models[1:]
    }
    for source in rewards.sources:
        result, error = source.results[n], source.errors[n]
        parts = {"score": result.score, "weight": source.weight, "error": error}
        if result.metrics:
            parts["metrics"] = dict(result.metrics)
        if result.token_rewards_A is not None:
            parts["token_rewards"] = [_short(x) for x in result.token_rewards_A]
        said[source.name] = parts
    return {"sources": said, "dropped": bool(rewards.dropped_N[n])}


def _number(x_N: Tensor | None, n: int) -> float | None:
    return None if x_N is None or bool(x_N[n].isnan()) else float(x_N[n])


def _short(x: float) -> float:
    return float(f"{x:.6g}") if math.isfinite(x) else x
