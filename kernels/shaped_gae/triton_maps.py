"""Parts of shaped_gae's Triton kernel: maps of the recursion's state, the search for a sequence, and turns in a tile.

A map takes the state (A, pending) to (a A + b pending + c, e pending + d). With a decay of their own, returns have a
second recursion with its own a, b and c on the same pending value.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compose_maps(a1, b1, c1, e1, d1, a2, b2, c2, e2, d2):
    """Return the map of later entries (1) followed by that of earlier ones (2)."""
    return a2 * a1, a2 * b1 + b2 * e1, a2 * c1 + b2 * d1 + c2, e2 * e1, e2 * d1 + d2


@triton.jit
def compose_both_maps(a1, b1, c1, e1, d1, f1, g1, h1, a2, b2, c2, e2, d2, f2, g2, h2):
    """Return the composition for two recursions; f, g and h are a, b and c of the second."""
    a, b, c, e, d = compose_maps(a1, b1, c1, e1, d1, a2, b2, c2, e2, d2)
    return a, b, c, e, d, f2 * f1, f2 * g1 + g2 * e1, f2 * h1 + g2 * d1 + h2


@triton.jit
def last_column(x, WIDTH: tl.constexpr):
    """Return the last column."""
    column = tl.arange(0, WIDTH)[None, :]
    return tl.sum(tl.where(column == WIDTH - 1, x, 0.0), axis=1)


@triton.jit
def find_sequence(slot, cu_ptr, sequences, stride, CHUNK: tl.constexpr, FANOUT: tl.constexpr):
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


@triton.jit
def is_kept(mask_ptr, t, low, high, mask_size):
    """Return whether entries t lie in [low, high) and are unmasked. Without a mask mask_size is 0."""
    inside = (t >= low) & (t < high)
    return inside & (tl.load(mask_ptr + t, mask=inside & (t < mask_size), other=1) != 0)


@triton.jit
def _take_nearest(found1, x1, found2, x2):
    return found1 | found2, tl.where(found2 != 0, x2, x1)


@triton.jit
def spread_over_turn(advantage, starts):
    """Return (advantage of each entry's turn, whether its turn starts in this row); lanes run backwards in time.

    A turn's advantage is known at its first token, a higher lane than those of the turn's other tokens.
    """
    found, nearest = tl.associative_scan((starts.to(tl.int32), advantage), 1, _take_nearest, reverse=True)
    return nearest, found != 0


@triton.jit
def fill_turn_tails(advantage_ptr, mask_ptr, advantage, starts, goes_on, behind, end, mask_size, CHUNK: tl.constexpr):
    """Write the advantage of a turn that starts in a row to its tokens behind the row, which other programs leave out.

    Args:
        advantage: [ROWS, CHUNK], right at the first token of each turn.
        goes_on: [ROWS, CHUNK], whether the entry after each is in its turn.
        behind: [ROWS], the entry behind the row.

    Returns:
        (number of tokens written for each row, their advantage), [ROWS] each.
    """
    lane = tl.arange(0, CHUNK)[None, :]
    # 1. A turn that goes on behind the row has the row's first start, unless it starts in an earlier chunk.
    start_lane = tl.min(tl.where(starts, lane, CHUNK), axis=1)
    leaves = tl.sum((goes_on & (lane == 0)).to(tl.int32), axis=1) != 0
    x = tl.sum(tl.where(lane == start_lane[:, None], advantage, 0.0), axis=1)
    # 2. Walk forward in time to the turn's end. No other program writes these entries.
    unfinished = (leaves & (start_lane < CHUNK)).to(tl.int32)
    written = unfinished * 0
    while tl.max(unfinished, axis=0) > 0:
        t = (behind + written)[:, None] + lane
        in_turn = is_kept(mask_ptr, t, behind[:, None], end[:, None], mask_size) & (unfinished != 0)[:, None]
        stop = tl.min(tl.where(in_turn, CHUNK, lane), axis=1)
        tl.store(advantage_ptr + t, x[:, None] + tl.zeros((1, CHUNK), tl.float32), mask=lane < stop[:, None])
        written += stop
        unfinished = tl.where(stop == CHUNK, unfinished, 0)
    return written, tl.where(written > 0, x, 0.0)
