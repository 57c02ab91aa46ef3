"""shaped_gae in Triton: one launch, one program per sequence, which walks its tokens from the last to the first.

An unmasked token maps the state (A, V) behind it to (gamma*lam*A + gamma*V + reward - value, value); a masked token is
the identity. Both are affine, so a block is one associative scan over (a, b, c, e, d) with A' = a A + b V + c and
V' = e V + d, and the state carries from block to block. Nothing is padded and nothing is atomic: every sum belongs to
one program, so the bits repeat and do not depend on the batch around a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import note_launch
from .reference import EXPONENT_LIMIT
from .types import Moments, ShapedGAE

BLOCK = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _then(a1, b1, c1, e1, d1, a2, b2, c2, e2, d2):
    """The map of later entries (1) followed by that of earlier ones (2)."""
    return a2 * a1, a2 * b1 + b2 * e1, a2 * c1 + b2 * d1 + c2, e2 * e1, e2 * d1 + d2


@triton.jit
def _estimate(d, ESTIMATOR: tl.constexpr, LIMIT: tl.constexpr):
    if ESTIMATOR == "k1":
        return d
    elif ESTIMATOR == "k2":
        return 0.5 * d * d
    elif ESTIMATOR == "abs":
        return tl.abs(d)
    else:
        x = -d
        bounded = tl.minimum(x, LIMIT)
        plain = tl.exp(bounded) - 1.0 + (x - bounded) * tl.exp(tl.full((), LIMIT, tl.float32)) - x
        # exp(x) - 1 - x cancels near 0; its series to x^9 is exact to fp32 for |x| < 0.5.
        series = 1.0 / 40320.0 + x * (1.0 / 362880.0)
        series = 1.0 / 720.0 + x * (1.0 / 5040.0 + x * series)
        series = 0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * series)))
        return tl.where(tl.abs(x) < 0.5, x * x * series, plain)


@triton.jit
def shaped_gae_kernel(
    score_ptr,
    value_ptr,
    logprob_ptr,
    ref_logprob_ptr,
    cu_ptr,
    bootstrap_ptr,
    mask_ptr,
    token_reward_ptr,
    kl_coef_ptr,
    advantage_ptr,
    return_ptr,
    reward_ptr,
    kl_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    kl_coef,
    gamma,
    decay,
    HAS_REFERENCE: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TOKEN_REWARD: tl.constexpr,
    HAS_KL_COEF_TENSOR: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_ptr + n).to(tl.int64)
    end = tl.load(cu_ptr + n + 1).to(tl.int64)
    score = tl.load(score_ptr + n).to(tl.float32)
    coef = tl.full((), 0.0, tl.float32) + kl_coef
    if HAS_KL_COEF_TENSOR:
        coef = tl.load(kl_coef_ptr).to(tl.float32)
    next_value = tl.full((), 0.0, tl.float32)
    if HAS_BOOTSTRAP:
        next_value = tl.load(bootstrap_ptr + n).to(tl.float32)
    advantage = tl.full((), 0.0, tl.float32)
    kl_sum = tl.full((), 0.0, tl.float32)
    count = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    m2 = tl.full((), 0.0, tl.float32)
    lane = tl.arange(0, BLOCK)
    for done in range(0, end - begin, BLOCK):
        # Lanes run backwards in time, so that an ordinary forward scan is the recursion.
        row = end - 1 - done - lane
        live = row >= begin
        keep = live
        if HAS_MASK:
            keep = live & (tl.load(mask_ptr + row, mask=live, other=0) != 0)
        value = tl.load(value_ptr + row, mask=keep, other=0.0).to(tl.float32)
        kl = tl.zeros((BLOCK,), tl.float32)
        if HAS_REFERENCE:
            d = tl.load(logprob_ptr + row, mask=keep, other=0.0).to(tl.float32)
            d -= tl.load(ref_logprob_ptr + row, mask=keep, other=0.0).to(tl.float32)
            kl = _estimate(d, ESTIMATOR, LIMIT)
        reward = -coef * kl
        if HAS_TOKEN_REWARD:
            reward += tl.load(token_reward_ptr + row, mask=keep, other=0.0).to(tl.float32)
        kept = keep.to(tl.int32)
        rank = tl.cumsum(kept, axis=0) + count.to(tl.int32)
        last = keep & (rank == 1)
        reward = tl.where(keep, reward + tl.where(last, score, 0.0), 0.0)

        a = tl.where(keep, decay, 1.0)
        b = tl.where(keep, gamma, 0.0)
        c = tl.where(keep, reward - value, 0.0)
        e = tl.where(keep, 0.0, 1.0)
        a, b, c, e, carried = tl.associative_scan((a, b, c, e, value), 0, _then)
        adv = a * advantage + b * next_value + c
        after = e * next_value + carried
        tl.store(advantage_ptr + row, tl.where(keep, adv, 0.0), mask=live)
        tl.store(return_ptr + row, tl.where(keep, adv + value, 0.0), mask=live)
        tl.store(reward_ptr + row, reward, mask=live)
        # The state behind the next block is that of the last lane.
        advantage = tl.sum(tl.where(lane == BLOCK - 1, adv, 0.0), axis=0)
        next_value = tl.sum(tl.where(lane == BLOCK - 1, after, 0.0), axis=0)

        kl_sum += tl.sum(tl.where(keep, kl, 0.0), axis=0)
        block_count = tl.sum(kept, axis=0).to(tl.float32)
        block_mean = tl.sum(tl.where(keep, adv, 0.0), axis=0) / tl.maximum(block_count, 1.0)
        off = tl.where(keep, adv - block_mean, 0.0)
        total = count + block_count
        share = block_count / tl.maximum(total, 1.0)
        delta = block_mean - mean
        m2 += tl.sum(off * off, axis=0) + delta * delta * count * share
        mean += delta * share
        count = total
    tl.store(kl_ptr + n, kl_sum)
    tl.store(count_ptr + n, count)
    tl.store(mean_ptr + n, mean)
    tl.store(m2_ptr + n, m2)


@torch.no_grad()
def shaped_gae(
    score_N: Tensor,
    value_A: Tensor,
    logprob_A: Tensor,
    ref_logprob_A: Tensor | None,
    cu_actions: Tensor,
    *,
    kl_coef,
    kl_estimator: str,
    gamma: float,
    lam: float,
    bootstrap_N: Tensor | None,
    mask_A: Tensor | None,
    token_reward_A: Tensor | None,
) -> ShapedGAE:
    sequences, device = score_N.shape[0], value_A.device

    def dense(x: Tensor | None) -> Tensor:
        # An absent input is never read; the kernel needs some pointer in its place.
        return value_A if x is None else x.contiguous()

    if mask_A is not None and mask_A.dtype == torch.bool:
        mask_A = mask_A.view(torch.uint8) if mask_A.is_contiguous() else mask_A.to(torch.uint8)
    out = torch.zeros(3, value_A.shape[0], dtype=torch.float32, device=device)
    sums = torch.zeros(4, sequences, dtype=torch.float32, device=device)
    value_A = value_A.contiguous()
    on_device = isinstance(kl_coef, Tensor)
    if sequences:
        with torch.cuda.device_of(value_A):
            note_launch("shaped_gae_kernel", "triton")
            shaped_gae_kernel[(sequences,)](
                score_N.contiguous(),
                value_A,
                logprob_A.contiguous(),
                dense(ref_logprob_A),
                cu_actions.contiguous(),
                dense(bootstrap_N),
                dense(mask_A),
                dense(token_reward_A),
                kl_coef.to(device) if on_device else value_A,
                *out,
                *sums,
                0.0 if on_device else float(kl_coef),
                gamma,
                gamma * lam,
                HAS_REFERENCE=ref_logprob_A is not None,
                HAS_BOOTSTRAP=bootstrap_N is not None,
                HAS_MASK=mask_A is not None,
                HAS_TOKEN_REWARD=token_reward_A is not None,
                HAS_KL_COEF_TENSOR=on_device,
                ESTIMATOR=kl_estimator,
                LIMIT=EXPONENT_LIMIT,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return ShapedGAE(*out, kl_N=sums[0], moments=_combine(sums[1:].to(torch.float64)))


def _combine(parts: Tensor) -> Moments:
    """Chan's rule over all sequences at once."""
    count_N, mean_N, m2_N = parts
    count = count_N.sum()
    mean = (count_N * mean_N).sum() / count.clamp(min=1)
    return Moments(count, mean, m2_N.sum() + (count_N * (mean_N - mean).square()).sum())
