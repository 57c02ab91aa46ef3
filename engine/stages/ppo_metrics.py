"""An iteration in figures, and its responses as rows to read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.algorithm.experience import Experience
from icegrt.algorithm.judge import Verdict
from icegrt.algorithm.update import UpdateOutcome, mean_grad_norm
from icegrt.kernels import masked_moments
from icegrt.metrics import Evaluation, JsonlWriter, PPOStep

_NOT_THE_ITERATION = ("evaluate", "checkpoint")


def ppo_step(
    iteration: int,
    experience: Experience,
    outcome: UpdateOutcome,
    kl_coef: float,
    seconds: dict[str, float],
    evaluation: Evaluation | None,
    group: dist.ProcessGroup,
) -> PPOStep:
    """The metrics of an iteration, reduced over `group` (the data-parallel ranks)."""
    planned, shaped, scores = experience.planned, experience.shaped, experience.scores
    rollout_A = torch.tensor([x for r in planned.responses for x in r.logprobs])
    reward_N = _sum_by_response(shaped.reward_A, planned.cu_actions)
    tokens_N = planned.cu_actions.diff().double()
    truncated_N = torch.tensor([float(r.truncated) for r in planned.responses])
    means = _means(
        {
            "score": scores.total_N,
            "reward_model": scores.reward_model_N,
            "function": scores.function_N,
            "reward": reward_N,
            "kl": shaped.kl_N,
            "entropy": experience.entropy_A,
            "tokens": tokens_N,
            "truncated": truncated_N,
        },
        group,
    )
    policy = outcome.policy_stats.reduce(group) if outcome.policy_stats is not None else None
    value = outcome.value_stats.reduce(group)
    return_moments = masked_moments(shaped.return_A.double(), group=group)
    unexplained = float(experience.moments.variance / return_moments.variance.clamp(min=1e-30))
    gap = _maximum((rollout_A - experience.old_logprob_A).abs().max(), group)
    elapsed = sum(s for phase, s in seconds.items() if phase not in _NOT_THE_ITERATION)
    count = int(means["tokens"][1])
    response_tokens = round(means["tokens"][0] * count)
    return PPOStep(
        iteration=iteration,
        score_mean=means["score"][0],
        reward_model_score_mean=means["reward_model"][0],
        function_score_mean=means["function"][0],
        score_std=float(masked_moments(scores.total_N.double(), group=group).variance.sqrt()),
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
        ptx_loss=outcome.ptx_loss_sum / outcome.ptx_tokens if outcome.ptx_tokens else None,
        advantage_mean=float(experience.moments.mean),
        advantage_std=float(experience.moments.variance.sqrt()),
        grad_norm_actor=mean_grad_norm(outcome.actor) if outcome.actor else 0.0,
        grad_norm_critic=mean_grad_norm(outcome.critic),
        lr_actor=outcome.actor[-1].lr if outcome.actor else 0.0,
        lr_critic=outcome.critic[-1].lr,
        skipped_steps=outcome.skipped,
        response_tokens_mean=means["tokens"][0],
        truncated_fraction=means["truncated"][0],
        response_tokens=response_tokens,
        response_tokens_per_second=response_tokens / elapsed,
        rollout_logprob_gap_max=gap,
        padding_fraction=planned.padding_fraction,
        seconds_by_phase=seconds,
        evaluation=evaluation,
    )


def _means(parts: dict[str, Tensor | None], group: dist.ProcessGroup) -> dict[str, tuple[float | None, float]]:
    moments = {name: masked_moments(x.double(), group=group) for name, x in parts.items() if x is not None}
    return {n: (float(moments[n].mean), float(moments[n].count)) if n in moments else (None, 0.0) for n in parts}


def _maximum(x: Tensor, group: dist.ProcessGroup) -> float:
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return float(x)


def _ratio(stats: Any, name: str) -> float:
    return float(getattr(stats, name) / stats.count) if stats is not None and float(stats.count) else 0.0


def _sum_by_response(x_A: Tensor, cu_actions: Tensor) -> Tensor:
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), x_A.double().cumsum(0)])
    return ends[cu_actions[1:].long()] - ends[cu_actions[:-1].long()]


def write_rollouts(path: Path, iteration: int, seed: int, experience: Experience, verdict: Verdict) -> None:
    """One row per response: text, ids, finish reason, score parts, KL, advantages, and what it was sampled with."""
    lengths = experience.planned.cu_actions.diff().tolist()
    advantages = experience.shaped.advantage_A.split(lengths)
    with JsonlWriter(path) as writer:
        for n, (response, sample) in enumerate(zip(experience.planned.responses, verdict.samples, strict=True)):
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
                    "score": _number(experience.scores.total_N, n),
                    "reward_model_score": _number(verdict.reward_model_N, n),
                    "function_score": _number(verdict.function_N, n),
                    "kl_nats": _number(experience.shaped.kl_N, n),
                    "prompt_ids": response.prompt,
                    "response_ids": response.tokens,
                    "advantages": [_short(x) for x in advantages[n].tolist()],
                    "logprobs": [_short(x) for x in response.logprobs],
                }
            )


def _number(x_N: Tensor | None, n: int) -> float | None:
    return None if x_N is None else float(x_N[n])


def _short(x: float) -> float:
    return float(f"{x:.6g}") if math.isfinite(x) else x
