"""The kernel of shaped_gae: a segmented scan over the packed action stream, whose carry crosses programs.

The state of the recursion, walked from the end of a sequence, is (A, pending): the advantage of the entry behind, and
gamma * V of it plus the score until an unmasked entry takes them. An unmasked entry maps the state to

    A' = decay * A + pending + reward - value        pending' = gamma * value

and a masked one to itself. Both maps are affine, A' = a A + b pending + c and pending' = e pending + d, so maps compose
and a run of entries is an associative scan. A lambda of their own gives returns a second recursion in the same scan.

With turns the last token of a turn decays A and takes pending, its other tokens add their rewards, and its first token
subtracts the value: the same maps. The first token alone knows the turn's advantage; its program writes it to all.

Every sequence is cut into chunks from its end. A chunk is one row of a program's tile; the slot of chunk k of sequence
n is cu[n] // CHUNK + n + k. No two chunks share a slot, so programs find their sequences by search alone. A program
scans its rows, publishes the map of each, waits for the programs before it that have later entries of the same
sequence, and applies the maps of those chunks in order. Programs draw tickets, so a program that is waited for already
runs. Neither timing nor the batch around a sequence enters its arithmetic: the bits repeat, alone or in a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton import floor_logprob, kl_estimate
from ..whitening.triton import finish_moments
from .triton_maps import (
    compose_both_maps,
    compose_maps,
    fill_turn_tails,
    find_sequence,
    is_kept,
    last_column,
    spread_over_turn,
)

# Legend
#   N  sequences                    A  entries of the stream, slack behind the last sequence included
#   tile  [ROWS, CHUNK] entries of one program: a row is a chunk, lanes run backwards in time
#   slots  places for chunks, tiles * ROWS of them; some stay empty
#   maps  [6, slots] fp32: a, b, c, e, d of each chunk, and its KL; with two recursions [9, slots]: f, g, h too
#   sync  [2 + tiles] int32: the next ticket, finished programs, and a flag for each published tile
#   *_size  extent of an optional input: A, N or 1, or 0 if it is absent


# One binary serves every estimator, size, alignment and set of optional inputs; only the tile, a second recursion and
# the unit are compiled in. Lanes run backwards, so a known alignment would not widen a single access.
@triton.jit(do_not_specialize=range(37), do_not_specialize_on_alignment=range(37))
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
    lam_ptr,
    lam_value_ptr,
    advantage_ptr,
    return_ptr,
    reward_ptr,
    kl_ptr,
    value_mask_ptr,
    map_ptr,
    partial_ptr,
    moments_ptr,
    sync_ptr,
    kl_coef,
    gamma,
    decay,
    value_decay,
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
    lam_size,
    lam_value_size,
    estimator,
    DECOUPLED: tl.constexpr,
    TURNS: tl.constexpr,
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
    n = find_sequence(slot, cu_ptr, sequences, search_stride, CHUNK, FANOUT)
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

    # 5. The map of each entry, and by a scan that of each row's entries up to it. A unit takes the state at its last
    # entry and leaves its own at its first; a token is both.
    lam = tl.load(lam_ptr + n, mask=real & (n < lam_size), other=0.0)
    decay_row = tl.where(n < lam_size, gamma * lam, decay)[:, None]
    takes, leaves = keep, keep
    if TURNS:
        goes_on = keep & is_kept(mask_ptr, t + 1, begin[:, None], end[:, None], mask_size)
        takes = keep & (goes_on == 0)
        leaves = keep & (is_kept(mask_ptr, t - 1, begin[:, None], end[:, None], mask_size) == 0)
    left = tl.where(leaves, value, 0.0)
    a = tl.where(takes, decay_row, 1.0)
    b = tl.where(takes, 1.0, 0.0)
    c = tl.where(keep, reward - left, 0.0)
    e = tl.where(keep, 0.0, 1.0)
    d = gamma * left
    if DECOUPLED:
        lam_value = tl.load(lam_value_ptr + n, mask=real & (n < lam_value_size), other=0.0)
        f = tl.where(takes, tl.where(n < lam_value_size, gamma * lam_value, value_decay)[:, None], 1.0)
        a, b, c, e, d, f, g, h = tl.associative_scan((a, b, c, e, d, f, b, c), 1, compose_both_maps)
    else:
        a, b, c, e, d = tl.associative_scan((a, b, c, e, d), 1, compose_maps)
    # 6. Publish the map of each row. The barrier puts every thread's store before the release of the flag.
    kl_row = tl.sum(kl, axis=1)
    # e of a whole chunk is 1 if it has no unmasked entry: its pending score was not taken.
    untaken = last_column(e, CHUNK)
    tl.store(map_ptr + slot, last_column(a, CHUNK))
    tl.store(map_ptr + slots + slot, last_column(b, CHUNK))
    tl.store(map_ptr + 2 * slots + slot, last_column(c, CHUNK))
    tl.store(map_ptr + 3 * slots + slot, untaken)
    tl.store(map_ptr + 4 * slots + slot, last_column(d, CHUNK))
    tl.store(map_ptr + 5 * slots + slot, kl_row)
    if DECOUPLED:
        tl.store(map_ptr + 6 * slots + slot, last_column(f, CHUNK))
        tl.store(map_ptr + 7 * slots + slot, last_column(g, CHUNK))
        tl.store(map_ptr + 8 * slots + slot, last_column(h, CHUNK))
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
    target_in = score * 0.0
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
        if DECOUPLED:
            pf = tl.load(past_ptr + 6 * slots, mask=behind, other=1.0, cache_modifier=".cg")
            pg = tl.load(past_ptr + 7 * slots, mask=behind, other=0.0, cache_modifier=".cg")
            ph = tl.load(past_ptr + 8 * slots, mask=behind, other=0.0, cache_modifier=".cg")
            pa, pb, pc, pe, pd, pf, pg, ph = tl.associative_scan((pa, pb, pc, pe, pd, pf, pg, ph), 1, compose_both_maps)
            rf, rg, rh = last_column(pf, LOOKBACK), last_column(pg, LOOKBACK), last_column(ph, LOOKBACK)
            target_in = rf * target_in + rg * pending_in + rh
        else:
            pa, pb, pc, pe, pd = tl.associative_scan((pa, pb, pc, pe, pd), 1, compose_maps)
        ra, rb, rc = last_column(pa, LOOKBACK), last_column(pb, LOOKBACK), last_column(pc, LOOKBACK)
        re, rd = last_column(pe, LOOKBACK), last_column(pd, LOOKBACK)
        advantage_in = ra * advantage_in + rb * pending_in + rc
        pending_in = re * pending_in + rd
        untaken_in = untaken_in * re

    # 9. Advantages from the incoming state; the score goes to the first unmasked lane of the sequence.
    advantage = a * advantage_in[:, None] + b * pending_in[:, None] + c
    target = advantage
    if DECOUPLED:
        target = f * target_in[:, None] + g * pending_in[:, None] + h
    first_lane = tl.min(tl.where(keep, lane, CHUNK), axis=1)
    scored = keep & (lane == first_lane[:, None]) & (untaken_in > 0.0)[:, None]
    reward += tl.where(scored, score[:, None], 0.0)
    tl.store(return_ptr + t, tl.where(leaves, target + value, 0.0), mask=in_chunk)
    tl.store(reward_ptr + t, tl.where(keep, reward, 0.0), mask=in_chunk)
    # 10. A turn's advantage belongs to its entries in this row and behind it. Entries whose turn starts in an earlier
    # chunk are left to that chunk's program.
    counted = keep
    if TURNS:
        tl.store(value_mask_ptr + t, leaves.to(tl.uint8), mask=in_chunk)
        tail, tail_advantage = fill_turn_tails(
            advantage_ptr, mask_ptr, advantage, leaves, goes_on, end - chunk * CHUNK, end, mask_size, CHUNK
        )
        advantage, started = spread_over_turn(advantage, leaves)
        counted = keep & started
        in_chunk = in_chunk & (counted | (keep == 0))
    tl.store(advantage_ptr + t, tl.where(counted, advantage, 0.0), mask=in_chunk)
    # 11. The last chunk of a sequence knows its KL. A score that no entry has taken is marked by NaN.
    ending = real & (chunk == last_chunk)
    unassigned = ending & (untaken_in * untaken > 0.0) & (score != 0.0)
    tl.store(kl_ptr + n, tl.where(unassigned, float("nan"), kl_in + kl_row), mask=ending)

    # 12. Moments of this tile in fp64, merged by the program that finishes last. A turn counts once for each token.
    wide = tl.where(counted, advantage, 0.0).to(tl.float64)
    count = tl.sum(tl.sum(counted.to(tl.float64), axis=1), axis=0)
    total = tl.sum(tl.sum(wide, axis=1), axis=0)
    if TURNS:
        count += tl.sum(tail.to(tl.float64), axis=0)
        total += tl.sum(tail.to(tl.float64) * tail_advantage.to(tl.float64), axis=0)
    mean = total / tl.maximum(count, 1.0)
    deviation = tl.where(counted, wide - mean, 0.0)
    m2 = tl.sum(tl.sum(deviation * deviation, axis=1), axis=0)
    if TURNS:
        deviation_of_tail = tail_advantage.to(tl.float64) - mean
        m2 += tl.sum(tl.where(tail > 0, tail.to(tl.float64) * deviation_of_tail * deviation_of_tail, 0.0), axis=0)
    mean = tl.where(tl.max(unassigned.to(tl.int32), axis=0) != 0, float("nan"), mean)
    finish_moments(count, mean, m2, partial_ptr, moments_ptr, sync_ptr + 1, tile, tiles)
