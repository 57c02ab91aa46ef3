"""Corrections of a policy loss by the log-probs of the rollout, which sampled the responses.

    tis    weight min(pi_old / pi_rollout, cap) beside PPO's clipped ratio pi_theta / pi_old; the weight is a constant
    dis    loss -A r with r = pi_theta / pi_rollout where 1 - low <= r <= 1 + high, else 0; there is no pi_old

Sources: truncated importance sampling, Yao et al. 2025 (https://fengyao.notion.site/off-policy-rl); dis is SAO's
(arXiv:2607.07508). With `correction_level=sequence` all tokens of a response have one ratio:

    tis    the product of its tokens' ratios, which makes the estimate unbiased (verl's rollout_is=sequence)
    dis    their geometric mean (GSPO, arXiv:2507.18071; a product leaves every region as responses become long). Every
           token keeps its advantage, and has the gradient -A r grad log pi_theta (there GSPO-token)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.packing import PackedBatch
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.scoring import LogprobScorer
from icegrt.roles.role import Role

# Ratios beyond exp(20) are logged as exp(20). A product over a long response overflows fp32.
MAX_LOG_RATIO = 20.0


def rollout_logprobs(plan: BatchPlan, device: torch.device) -> Tensor:
    """Return the log-probs that the rollout recorded for this rank's responses, [A] float32 in plan order."""
    return torch.tensor([x for r in plan.local_responses for x in r.logprobs], dtype=torch.float32).to(device)


def score_policies(
    config: PPOConfig, scorer: LogprobScorer, actor: Role, reference: Role, plan: BatchPlan
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return log-probs and entropies under the actor, and log-probs under the reference, [A] each on the device.

    If the configuration saves the actor's pass, the log-probs are the rollout's, and there are no entropies.
    """
    if config.actor_is_inferred:
        old_A, entropy_A = scorer(actor, plan.batches, entropy=True)
    else:
        old_A, entropy_A = rollout_logprobs(plan, actor.device), None
    ref_A, _ = scorer(reference, plan.batches)
    return old_A, entropy_A, ref_A


def behaviour_ratio(config: PPOConfig, plan: BatchPlan, old_logprob_A: Tensor, rollout_logprob_A: Tensor) -> Tensor:
    """Return pi_old / pi_rollout, of tokens or of whole responses as `correction_level` says, at most exp(20).

    Shape:
        old_logprob_A, rollout_logprob_A: (A), on the device. Returns (A) float32.
    """
    log_ratio_A = old_logprob_A - rollout_logprob_A
    if config.correction_level == "sequence":
        device = log_ratio_A.device
        mask_A = None if plan.mask_A is None else plan.mask_A.to(device)
        log_ratio_A = sum_by_sequence(log_ratio_A, plan.cu_actions.to(device), mask_A)
    return log_ratio_A.clamp(max=MAX_LOG_RATIO).exp()


def truncated_weight(config: PPOConfig, ratio_A: Tensor) -> Tensor:
    """Return min(ratio, cap), the weight of each token's loss under `tis`, [A]."""
    return ratio_A.clamp(max=config.tis_cap)


def anchor_of_sequence_ratio(logprob_A: Tensor, rollout_logprob_A: Tensor, batch: PackedBatch) -> Tensor:
    """Return old log-probs against which every token has the ratio of its response, [A] float32.

        old = logprob - mean over the response's counted tokens of (logprob - rollout_logprob)

    The loss then reads exp(logprob - old), the geometric mean of the tokens' ratios, and has its gradient by token.

    Args:
        logprob_A: log-probs under the policy that is trained, [A], detached.
        rollout_logprob_A: those of the rollout, [A].
        batch: the micro-batch.
    """
    mask_A = batch.action_mask_A
    ones_A = torch.ones_like(logprob_A) if mask_A is None else mask_A.to(logprob_A.dtype)
    sum_A = sum_by_sequence(logprob_A - rollout_logprob_A, batch.cu_actions, mask_A)
    count_A = sum_by_sequence(ones_A, batch.cu_actions, None)
    return logprob_A - (sum_A / count_A.clamp(min=1)).to(logprob_A.dtype)


def sum_by_sequence(x_A: Tensor, cu_actions: Tensor, mask_A: Tensor | None) -> Tensor:
    """Return at every action the sum over its sequence, formed in fp64: the same bits in every layout.

    Args:
        x_A: [A] float32; masked entries may be NaN.
        cu_actions: [N + 1] offsets.
        mask_A: [A] bool; None: all count.
    """
    lengths_N = cu_actions.diff().long()
    counted_A = x_A if mask_A is None else torch.where(mask_A, x_A, 0.0)
    sum_N = torch.segment_reduce(counted_A.double(), "sum", lengths=lengths_N, unsafe=True)
    return sum_N.repeat_interleave(lengths_N, output_size=x_A.shape[0]).to(x_A.dtype)


def effective_share(mean: float, variance: float) -> float:
    """Return the effective sample size of weights as a share of their number: mean^2 / (mean^2 + variance).

    Source: Kish 1965, "Survey Sampling".
    """
    square = mean * mean
    return square / (square + variance) if square + variance > 0 else math.nan


def counted_per_sequence(batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Return for each micro-batch on the host the number of counted actions of each sequence, [N] int64."""
    counts = []
    for batch in batches:
        lengths = torch.tensor(batch.response_lengths, dtype=torch.int64)
        if batch.action_mask_A is not None:
            ends = torch.cat([torch.zeros(1, dtype=torch.int64), batch.action_mask_A.long().cumsum(0)])
            lengths = ends[batch.cu_actions[1:].long()] - ends[batch.cu_actions[:-1].long()]
        counts.append(lengths)
    return counts
