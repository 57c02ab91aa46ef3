"""The experience of one iteration: planned into micro-batches, scored by the roles, shaped into advantages.

The plan made here serves scoring and update alike, so old and new log-probs come from identical shapes; scoring and
update read them with one routine (`linear_logprobs` and `linear_ppo_loss` share their forward), same rows, same chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.kernels import Moments, ShapedGAE, shaped_gae
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.scores import Scores


@dataclass(frozen=True)
class Experience:
    """An iteration's scored and shaped responses: this rank's, all `_A` tensors over its whole action stream."""

    plan: BatchPlan
    scores: Scores
    old_logprob_A: Tensor
    entropy_A: Tensor
    ref_logprob_A: Tensor
    value_A: Tensor
    shaped: ShapedGAE
    moments: Moments
    """Whitening moments of the advantages over all ranks."""


def shape(
    config: PPOConfig,
    kl_coef: float,
    plan: BatchPlan,
    scores: Scores,
    old_logprob_A: Tensor,
    ref_logprob_A: Tensor,
    value_A: Tensor,
    last_value_N: Tensor,
    token_reward_A: Tensor | None = None,
) -> ShapedGAE:
    """KL penalty, GAE, returns and this rank's moments in one pass over the action stream."""
    truncated_N = torch.tensor([r.truncated for r in plan.local_responses], dtype=torch.bool)
    bootstrap_N = torch.where(truncated_N, last_value_N, 0.0) if config.bootstrap_truncated else None
    return shaped_gae(
        scores.total_N,
        value_A,
        old_logprob_A,
        ref_logprob_A,
        plan.cu_actions,
        kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam,
        bootstrap_N=bootstrap_N,
        mask_A=plan.mask_A,
        token_reward_A=token_reward_A,
    )
