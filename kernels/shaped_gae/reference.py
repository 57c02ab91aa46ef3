"""Rewards, generalised advantages, returns and their moments over the packed action stream, in plain PyTorch.

Masked entries are dropped first. GAE over the remaining entries is GAE that masked entries carry through unchanged, and
nothing that a masked entry holds (NaN included) can leak. The recursion A_t = delta_t + gamma*lam*A_{t+1} runs by
doubling on the stream itself (log2 of the longest response steps, no padding): after k steps A_t holds the discounted
sum of 2^k deltas of its own sequence.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common.streams import may_be_nonzero
from ..kl_divergence.reference import estimate_kl, floor_logprob
from ..types import ShapedGAE
from ..validate import wide_dtype
from ..whitening.reference import masked_moments
from .inputs import GAECoefficients, GAEInputs

# Legend
#   N  sequences                          A  entries of the stream, slack behind the last sequence included
#   R  entries that count: unmasked, before cu_actions[-1]


@torch.no_grad()
def shaped_gae(inputs: GAEInputs, coefficients: GAECoefficients) -> ShapedGAE:
    """Return rewards, advantages and returns; see the public function."""
    value_A, score_N = inputs.value_A, inputs.score_N
    kl_coef, gamma = coefficients.kl_coef, coefficients.gamma
    dtype = wide_dtype(score_N, value_A, inputs.logprob_A, inputs.ref_logprob_A, inputs.token_reward_A)
    # 1. Drop what does not count. last_N: the last unmasked entry of each sequence that has one.
    index_R, sequence_R, length_N = _unmasked_entries(inputs.cu_actions, inputs.mask_A, value_A.shape[0])
    filled_N = length_N > 0
    last_N = length_N.cumsum(0)[filled_N] - 1

    def counted(x_A: Tensor) -> Tensor:
        return x_A[index_R].to(dtype)

    # 2. Rewards. With a coefficient of 0 a KL that is not finite must not become NaN.
    if inputs.ref_logprob_A is None:
        kl_R = torch.zeros(index_R.shape[0], dtype=dtype, device=value_A.device)
    else:
        logprob_R, ref_logprob_R = (floor_logprob(counted(x)) for x in (inputs.logprob_A, inputs.ref_logprob_A))
        kl_R = estimate_kl(logprob_R - ref_logprob_R, coefficients.kl_estimator)
    reward_R = -kl_coef * kl_R if may_be_nonzero(kl_coef) else torch.zeros_like(kl_R)
    if inputs.token_reward_A is not None:
        reward_R = reward_R + counted(inputs.token_reward_A)
    reward_R[last_N] += score_N[filled_N].to(dtype)

    # 3. Advantages. next_R is V_{t+1}: the following entry, or the bootstrap at the end of a sequence.
    value_R = counted(value_A)
    next_R = torch.cat([value_R[1:], value_R.new_zeros(min(1, value_R.shape[0]))])
    next_R[last_N] = 0.0 if inputs.bootstrap_N is None else inputs.bootstrap_N[filled_N].to(dtype)
    delta_R = reward_R + gamma * next_R - value_R
    advantage_R = _discounted_sum(delta_R, sequence_R, gamma * coefficients.lam, length_N)

    def scatter(x_R: Tensor) -> Tensor:
        return torch.zeros(value_A.shape, dtype=dtype, device=value_A.device).index_copy_(0, index_R, x_R)

    # 4. Results. A score without an action is marked by NaN, as on a device, where nothing can be raised.
    unassigned_score_N = ~filled_N & (score_N != 0)
    moments = masked_moments(advantage_R)
    return ShapedGAE(
        advantage_A=scatter(advantage_R),
        return_A=scatter(advantage_R + value_R),
        reward_A=scatter(reward_R),
        kl_N=_sum_by_sequence(kl_R, length_N).masked_fill(unassigned_score_N, torch.nan),
        moments=replace(moments, mean=moments.mean.masked_fill(unassigned_score_N.any(), torch.nan)),
    )


def _sum_by_sequence(x_R: Tensor, length_N: Tensor) -> Tensor:
    # segment_reduce rejects empty lengths.
    if length_N.shape[0] == 0:
        return x_R.new_zeros(0)
    # segment_reduce adds one by one; in fp64 that costs no digits of the result.
    return torch.segment_reduce(x_R.to(torch.float64), "sum", lengths=length_N, initial=0).to(x_R.dtype)


def _unmasked_entries(cu_actions: Tensor, mask_A: Tensor | None, extent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entries that count, the sequence of each, and how many each sequence has."""
    cu = cu_actions.long()
    # Slack beyond cu_actions[-1] gets the sequence N and is dropped.
    sequence_A = torch.searchsorted(cu[1:], torch.arange(extent, device=cu.device), right=True)
    keep_A = sequence_A < cu.shape[0] - 1
    if mask_A is not None:
        keep_A = keep_A & (mask_A != 0)
    index_R = keep_A.nonzero().squeeze(1)
    counted_before = torch.cat([keep_A.new_zeros(1, dtype=torch.long), keep_A.cumsum(0)])[cu.clamp(max=extent)]
    return index_R, sequence_A[index_R], counted_before.diff()


def _discounted_sum(delta_R: Tensor, sequence_R: Tensor, decay: float, length_N: Tensor) -> Tensor:
    """Return A_t = sum over k >= 0 of decay^k delta_{t+k} within each sequence."""
    sum_R, step = delta_R.clone(), 1
    longest = int(length_N.max()) if length_N.numel() else 0
    factor = decay
    # After each round an entry holds twice as many terms: its own, and those of the entry `step` later.
    while step < longest:
        same = sequence_R[step:] == sequence_R[:-step]
        sum_R[:-step] += torch.where(same, sum_R[step:] * factor, 0.0)
        factor, step = factor * factor, step * 2
    return sum_R


def has_unassigned_score(score_N: Tensor, cu_actions: Tensor, mask_A: Tensor | None) -> Tensor:
    """Return [N] bool: sequences with a nonzero score and no unmasked action to receive it."""
    if mask_A is None:
        return (cu_actions.diff() == 0) & (score_N != 0)
    _, _, length_N = _unmasked_entries(cu_actions, mask_A, mask_A.shape[0])
    return (length_N == 0) & (score_N != 0)
