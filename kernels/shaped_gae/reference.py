"""Rewards, generalised advantages, returns and their moments over the packed action stream, in plain PyTorch.

Masked entries are dropped first. GAE over the remaining entries is GAE that masked entries carry through unchanged, and
nothing that a masked entry holds (NaN included) can leak. The recursion A_t = delta_t + gamma*lam*A_{t+1} runs by
doubling on the stream itself (log2 of the longest response steps, no padding): after k steps A_t holds the discounted
sum of 2^k deltas of its own sequence.

Turns make a shorter stream: an entry per turn, with the sum of its rewards and the value at its first token. The
recursion over it is the same; then each token gets the advantage of its turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.streams import may_be_nonzero, turn_starts
from ..kl_divergence.reference import estimate_kl, floor_logprob
from ..types import ShapedGAE
from ..validate import wide_dtype
from ..whitening.reference import masked_moments
from .inputs import GAECoefficients, GAEInputs

# Legend
#   N  sequences                          A  entries of the stream, slack behind the last sequence included
#   R  entries that count: unmasked, before cu_actions[-1]
#   U  units of the recursion: the entries R, or turns


@torch.no_grad()
def shaped_gae(inputs: GAEInputs, coefficients: GAECoefficients) -> ShapedGAE:
    """Return rewards, advantages and returns; see the public function."""
    value_A, score_N, gamma = inputs.value_A, inputs.score_N, coefficients.gamma
    dtype = wide_dtype(score_N, value_A, inputs.logprob_A, inputs.ref_logprob_A, inputs.token_reward_A)
    # 1. Drop what does not count, and form the rewards.
    index_R, sequence_R, length_N = _unmasked_entries(inputs.cu_actions, inputs.mask_A, value_A.shape[0])
    filled_N = length_N > 0
    reward_R, kl_N = _rewards(inputs, coefficients, index_R, length_N, dtype)
    units = _Units(reward_R, value_A[index_R].to(dtype), sequence_R, length_N, index_R, None)
    if coefficients.by_turn:
        units = _turns(units, inputs.cu_actions, value_A.shape[0])

    # 2. Deltas. next_U is V of the following unit, or the bootstrap at the end of a sequence.
    last_N = units.length_N.cumsum(0)[filled_N] - 1
    next_U = torch.cat([units.value_U[1:], units.value_U.new_zeros(min(1, units.value_U.shape[0]))])
    next_U[last_N] = 0.0 if inputs.bootstrap_N is None else inputs.bootstrap_N[filled_N].to(dtype)
    delta_U = units.reward_U + gamma * next_U - units.value_U

    # 3. Both recursions. A token has the advantage of its unit.
    def recursion(lam: float | Tensor) -> Tensor:
        decay = gamma * lam.to(dtype)[units.sequence_U] if isinstance(lam, Tensor) else gamma * lam
        return _discounted_sum(delta_U, units.sequence_U, decay, units.length_N)

    advantage_U = recursion(coefficients.lam)
    target_U = advantage_U if coefficients.lam_value is None else recursion(coefficients.lam_value)
    advantage_R = advantage_U if units.unit_R is None else advantage_U[units.unit_R]

    def scatter(x: Tensor, index: Tensor = index_R) -> Tensor:
        return torch.zeros(value_A.shape, dtype=x.dtype, device=value_A.device).index_copy_(0, index, x)

    # 4. Results. A score without an action is marked by NaN, as on a device, where nothing can be raised.
    unassigned_score_N = ~filled_N & (score_N != 0)
    moments = masked_moments(advantage_R)
    return ShapedGAE(
        advantage_A=scatter(advantage_R),
        return_A=scatter(target_U + units.value_U, units.index_U),
        reward_A=scatter(reward_R),
        kl_N=kl_N.masked_fill(unassigned_score_N, torch.nan),
        moments=replace(moments, mean=moments.mean.masked_fill(unassigned_score_N.any(), torch.nan)),
        value_mask_A=scatter(torch.ones_like(units.index_U, dtype=torch.bool), units.index_U)
        if coefficients.by_turn
        else None,
    )


@dataclass(frozen=True)
class _Units:
    """The stream that the recursion runs over, in the order of the action stream."""

    reward_U: Tensor
    value_U: Tensor
    sequence_U: Tensor
    length_N: Tensor  # units of each sequence
    index_U: Tensor  # entry of the action stream with the value and the return
    unit_R: Tensor | None  # unit of each entry that counts; None: it is its own


def _turns(tokens: _Units, cu_actions: Tensor, extent: int) -> _Units:
    """Return turns: the sum of the rewards of their tokens, and the value at their first token."""
    keep_A = torch.zeros(extent, dtype=torch.bool, device=cu_actions.device).index_fill_(0, tokens.index_U, True)
    first_R = turn_starts(keep_A, cu_actions)[tokens.index_U]
    turn_R = first_R.cumsum(0) - 1
    sequence_U = tokens.sequence_U[first_R]
    return _Units(
        reward_U=_sum_by_segment(tokens.reward_U, turn_R.bincount()),
        value_U=tokens.value_U[first_R],
        sequence_U=sequence_U,
        length_N=sequence_U.bincount(minlength=tokens.length_N.shape[0]),
        index_U=tokens.index_U[first_R],
        unit_R=turn_R,
    )


def _rewards(
    inputs: GAEInputs, coefficients: GAECoefficients, index_R: Tensor, length_N: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the reward of each entry that counts, and the KL of each sequence."""
    kl_coef, filled_N = coefficients.kl_coef, length_N > 0

    def counted(x_A: Tensor) -> Tensor:
        return x_A[index_R].to(dtype)

    if inputs.ref_logprob_A is None:
        kl_R = torch.zeros(index_R.shape[0], dtype=dtype, device=index_R.device)
    else:
        logprob_R, ref_logprob_R = (floor_logprob(counted(x)) for x in (inputs.logprob_A, inputs.ref_logprob_A))
        kl_R = estimate_kl(logprob_R - ref_logprob_R, coefficients.kl_estimator)
    # With a coefficient of 0 a KL that is not finite must not become NaN.
    reward_R = -kl_coef * kl_R if may_be_nonzero(kl_coef) else torch.zeros_like(kl_R)
    if inputs.token_reward_A is not None:
        reward_R = reward_R + counted(inputs.token_reward_A)
    # The score belongs to the last unmasked entry.
    reward_R[length_N.cumsum(0)[filled_N] - 1] += inputs.score_N[filled_N].to(dtype)
    return reward_R, _sum_by_segment(kl_R, length_N)


def _sum_by_segment(x_R: Tensor, lengths: Tensor) -> Tensor:
    # segment_reduce rejects empty lengths.
    if lengths.shape[0] == 0:
        return x_R.new_zeros(0)
    # segment_reduce adds one by one; in fp64 that costs no digits of the result.
    return torch.segment_reduce(x_R.to(torch.float64), "sum", lengths=lengths, initial=0).to(x_R.dtype)


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


def _discounted_sum(delta_U: Tensor, sequence_U: Tensor, decay: float | Tensor, length_N: Tensor) -> Tensor:
    """Return A_t = sum over k >= 0 of decay^k delta_{t+k} within each sequence; decay: a number, or one per unit."""
    sum_U, step = delta_U.clone(), 1
    longest = int(length_N.max()) if length_N.numel() else 0
    factor = decay
    # After each round an entry holds twice as many terms: its own, and those of the entry `step` later.
    while step < longest:
        same = sequence_U[step:] == sequence_U[:-step]
        later = sum_U[step:] * (factor[step:] if isinstance(factor, Tensor) else factor)
        sum_U[:-step] += torch.where(same, later, 0.0)
        factor, step = factor * factor, step * 2
    return sum_U


def has_unassigned_score(score_N: Tensor, cu_actions: Tensor, mask_A: Tensor | None) -> Tensor:
    """Return [N] bool: sequences with a nonzero score and no unmasked action to receive it."""
    if mask_A is None:
        return (cu_actions.diff() == 0) & (score_N != 0)
    _, _, length_N = _unmasked_entries(cu_actions, mask_A, mask_A.shape[0])
    return (length_N == 0) & (score_N != 0)
