"""shaped_gae in Triton: one launch over the packed action stream, a segmented scan whose carry crosses programs.

The state of the recursion, walked from the end of a sequence, is (A, pending): the advantage of the entry behind, and
gamma * V of it plus the score until an unmasked entry takes them. An unmasked entry maps the state to

    A' = decay * A + pending + reward - value        pending' = gamma * value

and a masked one to itself. Both maps are affine, A' = a A + b pending + c and pending' = e pending + d, so maps compose
and a run of entries is an associative scan.

Every sequence is cut into chunks from its end. A chunk is one row of a program's tile; the slot of chunk k of sequence
n is cu[n] // CHUNK + n + k. No two chunks share a slot, so programs find their sequences by search alone. A program
scans its rows, publishes the map of each, waits for the programs before it that have later entries of the same
sequence, and applies the maps of those chunks in order. Programs draw tickets, so a program that is waited for already
runs. Neither timing nor the batch around a sequence enters its arithmetic: the bits repeat, alone or in a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.streams import mask_bytes
from ..common.triton import floor_logprob, kl_estimate, value_and_pointer
from ..dispatch import log_launch
from ..kl_divergence.reference import EXPONENT_LIMIT, LOGPROB_FLOOR
from ..stats import Moments
from ..types import ShapedGAE
from ..validate import KL_ESTIMATORS
from ..whitening.triton import finish_moments
from .inputs import GAECoefficients, GAEInputs

# Legend
#   N  sequences                    A  entries of the stream, slack behind the last sequence included
#   tile  [ROWS, CHUNK] entries of one program: a row is a chunk, lanes run backwards in time
#   slots  places for chunks, tiles * ROWS of them; some stay empty
#   maps  [6, slots] fp32: a, b, c, e, d of each chunk, and its KL
#   sync  [2 + tiles] int32: the next ticket, finished programs, and a flag for each published tile
#   *_size  extent of an optional input: A, N or 1, or 0 if it is absent

ROWS, CHUNK = 8, 128
# Chunks that one step of the look-back reads, and sequences that one step of the search compares.
LOOKBACK, FANOUT = 64, 64
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# Operations per entry, for the declared cost: reward, its map, seven steps of a scan of maps, and the moments.
FLOPS = 90


@triton.jit
def _compose_maps(a1, b1, c1, e1, d1, a2, b2, c2, e2, d2):
    """Return the map of later entries (1) followed by that of earlier ones (2)."""
    return a2 * a1, a2 * b1 + b2 * e1, a2 * c1 + b2 * d1 + c2, e2 * e1, e2 * d1 + d2


@triton.jit
def _last_column(x, WIDTH: tl.constexpr):
    """Return the last column."""
    column = tl.arange(0, WIDTH)[None, :]
    return tl.sum(tl.where(column == WIDTH - 1, x, 0.0), axis=1)


@triton.jit
def _find_sequence(slot, cu_ptr, sequences, stride, CHUNK: tl.constexpr, FANOUT: tl.constexpr):
    """Return the last n in [0, sequences] whose first slot, cu[n] // CHUNK + n, is at or before `slot`."""
    # A search of FANOUT ways: log_FANOUT(N) rounds of loads, each dependent on the one before.
    n = slot * 0
    step = tl.arange(0, FANOUT)[None, :] + 1
    while stride > 0:
        probe = n[:, None] + stride * step
        inside = probe <= sequences
        first_slot = tl.load(cu_ptr + probe, mask=inside, other=0).to(tl.int64) // CHUNK + probe
        n += stride * tl.sum((inside & (first_slot <= slot[:, None])).to(tl.int64), axis=1)
        stride = stride // FANOUT
    return n


# One binary serves every estimator, size, alignment and set of optional inputs; only the tile is compiled in.
# Lanes run backwards, so a known alignment would not widen a single access.
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
    slots,
    tiles,
    search_stride,
    reference_size,
    bootstrap_size,
    mask_size,
    token_reward_size,
    kl_coef_size,
    estimator,
    LIMIT: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    LOOKBACK: tl.constexpr,
    FANOUT: tl.constexpr,
):
    """Write advantages, returns and rewards of one tile, and the KL of sequences that end in it."""
    # 1. Draw a ticket. Tiles are numbered in the order in which programs start, so waiting for a lower one is safe.
    tile = tl.atomic_add(sync_ptr, 1)
    row = tl.arange(0, ROWS)
    slot = tile.to(tl.int64) * ROWS + row
    # 2. Find the sequence and the chunk of each row.
    n = _find_sequence(slot, cu_ptr, sequences, search_stride, CHUNK, FANOUT)
    # The slack behind the last sequence is a sequence of its own, which only needs its zeros.
    real = n < sequences
    begin = tl.load(cu_ptr + n).to(tl.int64)
    end = tl.load(cu_ptr + n + 1, mask=real, other=0).to(tl.int64)
    end = tl.where(real, end, actions)
    first_slot = begin // CHUNK + n
    chunk = slot - first_slot
    last_chunk = tl.maximum((end - begin + CHUNK - 1) // CHUNK - 1, 0)

    # 3. Load the entries. Lanes run backwards in time, so that an ordinary forward scan is the recursion.
    lane = tl.arange(0, CHUNK)[None, :]
    t = (end - 1 - chunk * CHUNK)[:, None] - lane
    in_chunk = t >= begin[:, None]
    keep = in_chunk & real[:, None]
    keep = keep & (tl.load(mask_ptr + t, mask=keep & (t < mask_size), other=1) != 0)
    value = tl.load(value_ptr + t, mask=keep, other=0.0)
    has_ref = keep & (t < reference_size)
    difference = floor_logprob(tl.load(logprob_ptr + t, mask=has_ref, other=0.0), FLOOR)
    difference -= floor_logprob(tl.load(ref_logprob_ptr + t, mask=has_ref, other=0.0), FLOOR)
    # 4. Rewards without the score. The estimator is a run-time number: all four are in the binary.
    kl = difference
    if estimator == 1:
        kl = kl_estimate(difference, "k2", LIMIT)
    elif estimator == 2:
        kl = kl_estimate(difference, "k3", LIMIT)
    elif estimator == 3:
        kl = kl_estimate(difference, "abs", LIMIT)
    coef = kl_coef
    if kl_coef_size > 0:
        coef = tl.load(kl_coef_ptr)
    # A coefficient of 0 takes the penalty out, also where it is not finite.
    reward = tl.where(coef != 0.0, -coef * kl, 0.0) + tl.load(
        token_reward_ptr + t, mask=keep & (t < token_reward_size), other=0.0
    )

    # 5. The map of each entry, and by a scan that of each row's entries up to it.
    a = tl.where(keep, decay, 1.0)
    b = tl.where(keep, 1.0, 0.0)
    c = tl.where(keep, reward - value, 0.0)
    e = tl.where(keep, 0.0, 1.0)
    d = tl.where(keep, gamma * value, 0.0)
    a, b, c, e, d = tl.associative_scan((a, b, c, e, d), 1, _compose_maps)
    # 6. Publish the map of each row. The barrier puts every thread's store before the release of the flag.
    kl_row = tl.sum(kl, axis=1)
    # e of a whole chunk is 1 if it has no unmasked entry: its pending score was not taken.
    untaken = _last_column(e, CHUNK)
    tl.store(map_ptr + slot, _last_column(a, CHUNK))
    tl.store(map_ptr + slots + slot, _last_column(b, CHUNK))
    tl.store(map_ptr + 2 * slots + slot, _last_column(c, CHUNK))
    tl.store(map_ptr + 3 * slots + slot, untaken)
    tl.store(map_ptr + 4 * slots + slot, _last_column(d, CHUNK))
    tl.store(map_ptr + 5 * slots + slot, kl_row)
    tl.debug_barrier()
    flag_ptr = sync_ptr + 2
    tl.atomic_xchg(flag_ptr + tile, 1, sem="release")

    # 7. Look back. Only the sequence of the first row can have begun in earlier programs: wait for those.
    group = tl.arange(0, LOOKBACK)
    first_tile = (tl.sum(tl.where(row == 0, first_slot, 0), axis=0) // ROWS).to(tl.int32)
    while first_tile < tile:
        # An atomic add of 0 is a load that acquires what the flag's program has published.
        before_this = first_tile + group < tile
        ready = tl.atomic_add(flag_ptr + first_tile + group, 0, mask=before_this, sem="acquire")
        missing = tl.sum(tl.where(before_this & (ready == 0), 1, 0), axis=0)
        first_tile += tl.where(missing == 0, LOOKBACK, 0)
    tl.debug_barrier()

    # 8. The state at the end of each row: start at the sequence's end, apply the maps of the chunks in between.
    score = tl.load(score_ptr + n, mask=real, other=0.0)
    # Triton 3.9: zeros in place of score * 0.0 spill registers on sm_90 -> only advantages start from the score. One
    # that is not finite makes them NaN (a CPU gives NaN or infinity), and does not reach kl_N.
    zero = tl.zeros((ROWS,), tl.float32)
    advantage_in = score * 0.0
    pending_in = score + gamma * tl.load(bootstrap_ptr + n, mask=real & (n < bootstrap_size), other=0.0)
    untaken_in = zero + 1.0
    kl_in = zero
    reach = tl.max(tl.where(chunk <= last_chunk, chunk, 0), axis=0)
    for start in range(0, reach, LOOKBACK):
        past = start + group[None, :]
        behind = past < chunk[:, None]
        # ".cg" skips the first-level cache, which may hold what these slots held before.
        past_ptr = map_ptr + first_slot[:, None] + past
        pa = tl.load(past_ptr, mask=behind, other=1.0, cache_modifier=".cg")
        pb = tl.load(past_ptr + slots, mask=behind, other=0.0, cache_modifier=".cg")
        pc = tl.load(past_ptr + 2 * slots, mask=behind, other=0.0, cache_modifier=".cg")
        pe = tl.load(past_ptr + 3 * slots, mask=behind, other=1.0, cache_modifier=".cg")
        pd = tl.load(past_ptr + 4 * slots, mask=behind, other=0.0, cache_modifier=".cg")
        kl_in += tl.sum(tl.load(past_ptr + 5 * slots, mask=behind, other=0.0, cache_modifier=".cg"), axis=1)
        # A scan combines in order; a reduction need not, and these maps do not commute.
        pa, pb, pc, pe, pd = tl.associative_scan((pa, pb, pc, pe, pd), 1, _compose_maps)
        ra, rb, rc = _last_column(pa, LOOKBACK), _last_column(pb, LOOKBACK), _last_column(pc, LOOKBACK)
        re, rd = _last_column(pe, LOOKBACK), _last_column(pd, LOOKBACK)
        advantage_in = ra * advantage_in + rb * pending_in + rc
        pending_in = re * pending_in + rd
        untaken_in = untaken_in * re

    # 9. Advantages from the incoming state; the score goes to the first unmasked lane of the sequence.
    advantage = a * advantage_in[:, None] + b * pending_in[:, None] + c
    first_lane = tl.min(tl.where(keep, lane, CHUNK), axis=1)
    scored = keep & (lane == first_lane[:, None]) & (untaken_in > 0.0)[:, None]
    reward += tl.where(scored, score[:, None], 0.0)
    tl.store(advantage_ptr + t, tl.where(keep, advantage, 0.0), mask=in_chunk)
    tl.store(return_ptr + t, tl.where(keep, advantage + value, 0.0), mask=in_chunk)
    tl.store(reward_ptr + t, tl.where(keep, reward, 0.0), mask=in_chunk)
    # 10. The last chunk of a sequence knows its KL. A score that no entry has taken is marked by NaN.
    ending = real & (chunk == last_chunk)
    unassigned = ending & (untaken_in * untaken > 0.0) & (score != 0.0)
    tl.store(kl_ptr + n, tl.where(unassigned, float("nan"), kl_in + kl_row), mask=ending)

    # 11. Moments of this tile in fp64, merged by the program that finishes last.
    wide = tl.where(keep, advantage, 0.0).to(tl.float64)
    count = tl.sum(tl.sum(keep.to(tl.float64), axis=1), axis=0)
    mean = tl.sum(tl.sum(wide, axis=1), axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(keep, wide - mean, 0.0)
    m2 = tl.sum(tl.sum(deviation * deviation, axis=1), axis=0)
    mean = tl.where(tl.max(unassigned.to(tl.int32), axis=0) != 0, float("nan"), mean)
    finish_moments(count, mean, m2, partial_ptr, moments_ptr, sync_ptr + 1, tile, tiles)


@torch.no_grad()
def shaped_gae(inputs: GAEInputs, coefficients: GAECoefficients) -> ShapedGAE:
    """Return rewards, advantages and returns; see the public function."""
    N, A, device = inputs.score_N.shape[0], inputs.value_A.shape[0], inputs.value_A.device

    def stream(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.float32).contiguous()

    # 1. The grid: the last slot that a sequence or the slack can reach, rounded up to tiles of ROWS.
    tiles = triton.cdiv(A // CHUNK + N + 1, ROWS)
    # 2. Buffers. Only the tickets and flags need zeros: everything else is written before it is read.
    advantage_A, return_A, reward_A = torch.empty(3, A, dtype=torch.float32, device=device)
    kl_N = torch.empty(N, dtype=torch.float32, device=device)
    maps = torch.empty(6 * tiles * ROWS, dtype=torch.float32, device=device)
    moments = torch.empty(3 + 3 * tiles, dtype=torch.float64, device=device)
    sync = torch.zeros(2 + tiles, dtype=torch.int32, device=device)
    # 3. A coefficient on the device is passed by pointer, so that the host does not wait for it.
    kl_coef, kl_coef_ptr = value_and_pointer(coefficients.kl_coef)
    _gae_step(
        stream(inputs.score_N),
        stream(inputs.value_A),
        stream(inputs.logprob_A),
        stream(inputs.ref_logprob_A),
        inputs.cu_actions.to(torch.int32).contiguous(),
        stream(inputs.bootstrap_N),
        None if inputs.mask_A is None else mask_bytes(inputs.mask_A),
        stream(inputs.token_reward_A),
        stream(kl_coef_ptr),
        advantage_A,
        return_A,
        reward_A,
        kl_N,
        maps,
        moments,
        sync,
        kl_coef,
        coefficients.gamma,
        coefficients.lam,
        KL_ESTIMATORS.index(coefficients.kl_estimator),
    )
    return ShapedGAE(advantage_A, return_A, reward_A, kl_N, Moments(*moments[:3].unbind()))


def _gae_cost(
    score_N: Tensor,
    value_A: Tensor,
    logprob_A: Tensor | None,
    ref_logprob_A: Tensor | None,
    cu_actions: Tensor,
    *others: Any,
) -> Cost:
    optional, (*writes, maps, moments, sync) = others[:4], others[4:11]
    reads = [score_N, value_A, cu_actions, *optional]
    # Log-probs are read where there is a reference alone.
    reads += [] if ref_logprob_A is None else [logprob_A, ref_logprob_A]
    # The moments of tiles and, at most, the maps of chunks are read back.
    reads += [maps, moments[3:], sync]
    return Cost.of_pass(reads, [*writes, maps, moments, sync], FLOPS * value_A.numel())


@device_operator(
    "shaped_gae_kernel(Tensor score, Tensor value, Tensor? logprob, Tensor? ref_logprob, Tensor cu_actions, "
    "Tensor? bootstrap, Tensor? mask, Tensor? token_reward, Tensor? kl_coef_ptr, Tensor(a!) advantage, "
    "Tensor(b!) returns, Tensor(c!) reward, Tensor(d!) kl, Tensor(e!) maps, Tensor(f!) moments, Tensor(g!) sync, "
    "float kl_coef, float gamma, float lam, int estimator)",
    _gae_cost,
)
def _gae_step(
    score_N: Tensor,
    value_A: Tensor,
    logprob_A: Tensor | None,
    ref_logprob_A: Tensor | None,
    cu_actions: Tensor,
    bootstrap_N: Tensor | None,
    mask_A: Tensor | None,
    token_reward_A: Tensor | None,
    kl_coef_ptr: Tensor | None,
    advantage_A: Tensor,
    return_A: Tensor,
    reward_A: Tensor,
    kl_N: Tensor,
    maps: Tensor,
    moments: Tensor,
    sync: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    estimator: int,
) -> None:
    # An absent input is never read; the kernel needs some pointer in its place.
    N, A, tiles = score_N.shape[0], value_A.shape[0], sync.numel() - 2

    def pointer(x: Tensor | None) -> Tensor:
        return advantage_A if x is None else x

    def extent(x: Tensor | None) -> int:
        return 0 if x is None else x.numel()

    # The first stride of the search: the largest power of FANOUT up to N.
    search_stride = 1
    while search_stride * FANOUT <= N:
        search_stride *= FANOUT
    with torch.cuda.device_of(value_A):
        log_launch("shaped_gae_kernel", "triton")
        shaped_gae_kernel[(tiles,)](
            score_N,
            value_A,
            pointer(logprob_A),
            pointer(ref_logprob_A),
            cu_actions,
            pointer(bootstrap_N),
            advantage_A.view(torch.uint8) if mask_A is None else mask_A,
            pointer(token_reward_A),
            pointer(kl_coef_ptr),
            advantage_A,
            return_A,
            reward_A,
            kl_N,
            maps,
            moments[3:],
            moments,
            sync,
            kl_coef,
            gamma,
            gamma * lam,
            N,
            A,
            tiles * ROWS,
            tiles,
            search_stride,
            extent(ref_logprob_A),
            extent(bootstrap_N),
            extent(mask_A),
            extent(token_reward_A),
            extent(kl_coef_ptr),
            estimator,
            LIMIT=EXPONENT_LIMIT,
            FLOOR=LOGPROB_FLOOR,
            ROWS=ROWS,
            CHUNK=CHUNK,
            LOOKBACK=LOOKBACK,
            FANOUT=FANOUT,
            **OPTIONS,
        )
