"""shaped_gae in Triton: one launch over the packed action stream, a segmented scan whose carry crosses programs.

With `pending` = gamma * V of the entry behind plus the score until an unmasked entry takes it, an unmasked entry maps
the state (A, pending) to (decay * A + pending + reward - value, gamma * value) and a masked one to itself. Both are
affine, A' = a A + b pending + c and pending' = e pending + d, so maps compose and a run of entries is an associative
scan.

Every sequence is cut into chunks from its end. A chunk is one row of a program's tile; the place of chunk k of
sequence n is cu[n] // CHUNK + n + k, which leaves no two in one place, so programs find their sequences by search
alone. A program scans its rows, publishes the map of each, waits for the programs before it that hold later entries
of the same sequence, and applies the maps of those chunks in their order. Programs draw tickets, so whoever is waited
for already runs. Neither timing nor the batch around a sequence enters its arithmetic: the bits repeat, alone or in
company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import log_launch
from ..kl_divergence.reference import EXPONENT_LIMIT
from ..kl_divergence.triton import estimate
from ..types import Moments, ShapedGAE
from ..validate import KL_ESTIMATORS
from ..whitening.triton import finish_moments

ROWS, CHUNK = 8, 128
# Chunks that are looked back at in one step, and sequences that are looked at in one step of the search.
LOOKBACK, FANOUT = 64, 64
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _then(a1, b1, c1, e1, d1, a2, b2, c2, e2, d2):
    """The map of later entries (1) followed by that of earlier ones (2)."""
    return a2 * a1, a2 * b1 + b2 * e1, a2 * c1 + b2 * d1 + c2, e2 * e1, e2 * d1 + d2


@triton.jit
def _last(x, WIDTH: tl.constexpr):
    """The last column."""
    column = tl.arange(0, WIDTH)[None, :]
    return tl.sum(tl.where(column == WIDTH - 1, x, 0.0), axis=1)


@triton.jit
def _sequence_of(slot, cu_ptr, sequences, stride, CHUNK: tl.constexpr, FANOUT: tl.constexpr):
    """The last n in [0, sequences] whose first place, cu[n] // CHUNK + n, is at or before `slot`."""
    n = slot * 0
    step = tl.arange(0, FANOUT)[None, :] + 1
    while stride > 0:
        probe = n[:, None] + stride * step
        inside = probe <= sequences
        place = tl.load(cu_ptr + probe, mask=inside, other=0).to(tl.int64) // CHUNK + probe
        n += stride * tl.sum((inside & (place <= slot[:, None])).to(tl.int64), axis=1)
        stride = stride // FANOUT
    return n


# Nothing but the tile shapes the code: one binary serves every estimator, size, alignment and set of optional inputs
# (the extent of an absent one is 0). Lanes run backwards, so alignment would not widen a single access.
@triton.jit(do_not_specialize=range(31), do_not_specialize_on_alignment=range(31))
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
    map_ptr,
    partial_ptr,
    moments_ptr,
    sync_ptr,
    kl_coef,
    gamma,
    decay,
    sequences,
    actions,
    places,
    tiles,
    search_stride,
    reference_size,
    bootstrap_size,
    mask_size,
    token_reward_size,
    kl_coef_size,
    estimator,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LOOKBACK: tl.constexpr,
    FANOUT: tl.constexpr,
):
    tile = tl.atomic_add(sync_ptr, 1)
    row = tl.arange(0, ROWS)
    slot = tile.to(tl.int64) * ROWS + row
    n = _sequence_of(slot, cu_ptr, sequences, search_stride, CHUNK, FANOUT)
    real = n < sequences  # else the slack behind the last sequence, which only needs its zeros
    begin = tl.load(cu_ptr + n).to(tl.int64)
    end = tl.load(cu_ptr + n + 1, mask=real, other=0).to(tl.int64)
    end = tl.where(real, end, actions)
    first_slot = begin // CHUNK + n
    chunk = slot - first_slot
    last_chunk = tl.maximum((end - begin + CHUNK - 1) // CHUNK - 1, 0)

    # Lanes run backwards in time, so that an ordinary forward scan is the recursion.
    lane = tl.arange(0, CHUNK)[None, :]
    t = (end - 1 - chunk * CHUNK)[:, None] - lane
    live = t >= begin[:, None]
    keep = live & real[:, None]
    keep = keep & (tl.load(mask_ptr + t, mask=keep & (t < mask_size), other=1) != 0)
    value = tl.load(value_ptr + t, mask=keep, other=0.0)
    charged = keep & (t < reference_size)
    difference = tl.load(logprob_ptr + t, mask=charged, other=0.0)
    difference -= tl.load(ref_logprob_ptr + t, mask=charged, other=0.0)
    kl = difference
    if estimator == 1:
        kl = estimate(difference, "k2", LIMIT)
    elif estimator == 2:
        kl = estimate(difference, "k3", LIMIT)
    elif estimator == 3:
        kl = estimate(difference, "abs", LIMIT)
    coef = kl_coef
    if kl_coef_size > 0:
        coef = tl.load(kl_coef_ptr)
    # A coefficient of 0 takes the penalty out, also where it is infinite.
    reward = tl.where(coef != 0.0, -coef * kl, 0.0) + tl.load(
        token_reward_ptr + t, mask=keep & (t < token_reward_size), other=0.0
    )

    a = tl.where(keep, decay, 1.0)
    b = tl.where(keep, 1.0, 0.0)
    c = tl.where(keep, reward - value, 0.0)
    e = tl.where(keep, 0.0, 1.0)
    d = tl.where(keep, gamma * value, 0.0)
    a, b, c, e, d = tl.associative_scan((a, b, c, e, d), 1, _then)
    kl_row = tl.sum(kl, axis=1)
    untaken = _last(e, CHUNK)  # 1 where the chunk has no unmasked entry
    tl.store(map_ptr + slot, _last(a, CHUNK))
    tl.store(map_ptr + places + slot, _last(b, CHUNK))
    tl.store(map_ptr + 2 * places + slot, _last(c, CHUNK))
    tl.store(map_ptr + 3 * places + slot, untaken)
    tl.store(map_ptr + 4 * places + slot, _last(d, CHUNK))
    tl.store(map_ptr + 5 * places + slot, kl_row)
    tl.debug_barrier()
    flag_ptr = sync_ptr + 2
    tl.atomic_xchg(flag_ptr + tile, 1, sem="release")

    # Only the sequence of the first row can have begun in earlier programs.
    group = tl.arange(0, LOOKBACK)
    waiting = (tl.sum(tl.where(row == 0, first_slot, 0), axis=0) // ROWS).to(tl.int32)
    while waiting < tile:
        wanted = waiting + group < tile
        ready = tl.atomic_add(flag_ptr + waiting + group, 0, mask=wanted, sem="acquire")
        missing = tl.sum(tl.where(wanted & (ready == 0), 1, 0), axis=0)
        waiting += tl.where(missing == 0, LOOKBACK, 0)
    tl.debug_barrier()

    score = tl.load(score_ptr + n, mask=real, other=0.0)
    advantage_in = score * 0.0
    pending_in = score + gamma * tl.load(bootstrap_ptr + n, mask=real & (n < bootstrap_size), other=0.0)
    untaken_in = advantage_in + 1.0
    kl_in = advantage_in
    reach = tl.max(tl.where(chunk <= last_chunk, chunk, 0), axis=0)
    for start in range(0, reach, LOOKBACK):
        past = start + group[None, :]
        behind = past < chunk[:, None]
        # Past the first-level cache, which may hold what these places held before.
        at = map_ptr + first_slot[:, None] + past
        pa = tl.load(at, mask=behind, other=1.0, cache_modifier=".cg")
        pb = tl.load(at + places, mask=behind, other=0.0, cache_modifier=".cg")
        pc = tl.load(at + 2 * places, mask=behind, other=0.0, cache_modifier=".cg")
        pe = tl.load(at + 3 * places, mask=behind, other=1.0, cache_modifier=".cg")
        pd = tl.load(at + 4 * places, mask=behind, other=0.0, cache_modifier=".cg")
        kl_in += tl.sum(tl.load(at + 5 * places, mask=behind, other=0.0, cache_modifier=".cg"), axis=1)
        # A scan keeps the order of what it combines; a reduction would not.
        pa, pb, pc, pe, pd = tl.associative_scan((pa, pb, pc, pe, pd), 1, _then)
        ra, rb, rc = _last(pa, LOOKBACK), _last(pb, LOOKBACK), _last(pc, LOOKBACK)
        re, rd = _last(pe, LOOKBACK), _last(pd, LOOKBACK)
        advantage_in = ra * advantage_in + rb * pending_in + rc
        pending_in = re * pending_in + rd
        untaken_in = untaken_in * re

    advantage = a * advantage_in[:, None] + b * pending_in[:, None] + c
    first_lane = tl.min(tl.where(keep, lane, CHUNK), axis=1)
    scored = keep & (lane == first_lane[:, None]) & (untaken_in > 0.0)[:, None]
    reward += tl.where(scored, score[:, None], 0.0)
    tl.store(advantage_ptr + t, tl.where(keep, advantage, 0.0), mask=live)
    tl.store(return_ptr + t, tl.where(keep, advantage + value, 0.0), mask=live)
    tl.store(reward_ptr + t, tl.where(keep, reward, 0.0), mask=live)
    ending = real & (chunk == last_chunk)
    homeless = ending & (untaken_in * untaken > 0.0) & (score != 0.0)
    tl.store(kl_ptr + n, tl.where(homeless, float("nan"), kl_in + kl_row), mask=ending)

    wide = tl.where(keep, advantage, 0.0).to(tl.float64)
    count = tl.sum(tl.sum(keep.to(tl.float64), axis=1), axis=0)
    mean = tl.sum(tl.sum(wide, axis=1), axis=0) / tl.maximum(count, 1.0)
    off = tl.where(keep, wide - mean, 0.0)
    m2 = tl.sum(tl.sum(off * off, axis=1), axis=0)
    mean = tl.where(tl.max(homeless.to(tl.int32), axis=0) != 0, float("nan"), mean)
    finish_moments(count, mean, m2, partial_ptr, moments_ptr, sync_ptr + 1, tile, tiles)


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
    N, A, device = score_N.shape[0], value_A.shape[0], value_A.device

    def stream(x: Tensor | None) -> Tensor:
        # An absent input is never read; the kernel needs some pointer in its place.
        return advantage_A if x is None else x.to(torch.float32).contiguous()

    def extent(x: Tensor | None) -> int:
        return 0 if x is None else x.numel()

    places = A // CHUNK + N + 1
    tiles = triton.cdiv(places, ROWS)
    places = tiles * ROWS
    stride = 1
    while stride * FANOUT <= N:
        stride *= FANOUT
    advantage_A, return_A, reward_A = torch.empty(3, A, dtype=torch.float32, device=device)
    kl_N = torch.empty(N, dtype=torch.float32, device=device)
    maps = torch.empty(6 * places, dtype=torch.float32, device=device)
    moments = torch.empty(3 + 3 * tiles, dtype=torch.float64, device=device)
    sync = torch.zeros(2 + tiles, dtype=torch.int32, device=device)
    coef = kl_coef if isinstance(kl_coef, Tensor) else None
    keep_A = advantage_A
    if mask_A is not None:
        keep_A = (mask_A if mask_A.dtype == torch.bool else mask_A != 0).contiguous()
    with torch.cuda.device_of(value_A):
        log_launch("shaped_gae_kernel", "triton")
        shaped_gae_kernel[(tiles,)](
            stream(score_N),
            stream(value_A),
            stream(logprob_A),
            stream(ref_logprob_A),
            cu_actions.to(torch.int32).contiguous(),
            stream(bootstrap_N),
            keep_A.view(torch.uint8),
            stream(token_reward_A),
            stream(coef),
            advantage_A,
            return_A,
            reward_A,
            kl_N,
            maps,
            moments[3:],
            moments,
            sync,
            0.0 if coef is not None else float(kl_coef),
            gamma,
            gamma * lam,
            N,
            A,
            places,
            tiles,
            stride,
            extent(ref_logprob_A),
            extent(bootstrap_N),
            extent(mask_A),
            extent(token_reward_A),
            extent(coef),
            KL_ESTIMATORS.index(kl_estimator),
            LIMIT=EXPONENT_LIMIT,
            ROWS=ROWS,
            CHUNK=CHUNK,
            LOOKBACK=LOOKBACK,
            FANOUT=FANOUT,
            **OPTIONS,
        )
    return ShapedGAE(advantage_A, return_A, reward_A, kl_N, Moments(*moments[:3].unbind()))
