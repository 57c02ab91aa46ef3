"""sample_tokens in Triton: one program per row reads it once for the draw and the log-prob of what was drawn.

The hash of a candidate is that of reference_sampling, bit for bit. Departing from it, -log1p(-u) is log(1 - u)
rescaled by u / (1 - (1 - u)), which undoes the rounding of 1 - u (Kahan), and the log-sum-exp runs along with the
maximum. top-k and top-p need no sort: the last value that is kept is found bit by bit, with a count or a mass over
the row in each of 32 steps (the row stays in the cache), and an id settles its equals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import log_launch
from ..types import VocabShard
from .reference import Draw, merge_draws, scaled_rows

# Wide blocks: a row is one program's, and every block costs it several reductions over all its warps. With 8 warps
# this width spills, and so do narrower ones on some generation with Triton 3.6 or 3.9.
BLOCK = 4096
OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}
# top_p travels in units of 2^-53: a float argument would round it to fp32, which a tie can show.
WHOLE = tl.constexpr(1 << 53)


@triton.jit
def _mix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_key(seed, sequence_id, position):
    """One uint64 per row; its halves key the candidates."""
    key = _mix64(seed.to(tl.int64).to(tl.uint64)) ^ sequence_id.to(tl.int64).to(tl.uint64)
    return _mix64(_mix64(key) ^ position.to(tl.int64).to(tl.uint64))


@triton.jit
def candidate_hash(key, ids):
    """uint32 below 2^31."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    x = ids.to(tl.uint32) * 0x9E3779B1 + low
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D + high
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return x & 0x7FFFFFFF


@triton.jit
def gumbel(bits):
    v = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994039535522)
    w = 1.0 - v
    lost = 1.0 - w
    noise = tl.where(lost == 0.0, v, -tl.log(w) * (v / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(noise)


@triton.jit
def _row(row_ptr, at, columns, temperature):
    z = tl.load(row_ptr + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    return tl.div_rn(z, tl.full(z.shape, 0.0, tl.float32) + temperature)


@triton.jit
def _order_key(z):
    """int64 in [0, 2^32) that orders as z does."""
    bits = (z + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2147483648


@triton.jit
def _survives(key, at, last, cut):
    return (key > last) | ((key == last) & (at <= cut))


@triton.jit
def _leading(row_ptr, columns, temperature, peak, last, cut, target, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Narrows (last, cut), the last value that survives and the last id among its equals, to the columns before which
    less than `target` lies: `target` of their number, or where WEIGHTED of the mass of what survived so far."""
    lane = tl.arange(0, BLOCK)
    if WEIGHTED:
        mass = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, columns, BLOCK):
            z = _row(row_ptr, begin + lane, columns, temperature)
            alive = _survives(_order_key(z), begin + lane, last, cut) & (begin + lane < columns)
            mass += tl.where(alive, tl.exp(z - peak), 0.0).to(tl.float64)
        target = target * tl.sum(mass, axis=0)
    found = last * 0
    step = found + 2147483648
    while step > 0:
        raised = found + step
        mass = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, columns, BLOCK):
            z = _row(row_ptr, begin + lane, columns, temperature)
            key = _order_key(z)
            alive = _survives(key, begin + lane, last, cut) & (begin + lane < columns) & (key >= raised)
            if WEIGHTED:
                mass += tl.where(alive, tl.exp(z - peak), 0.0).to(tl.float64)
            else:
                mass += alive.to(tl.float64)
        found = tl.where(tl.sum(mass, axis=0) >= target, raised, found)
        step = step // 2
    above = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, columns, BLOCK):
        z = _row(row_ptr, begin + lane, columns, temperature)
        key = _order_key(z)
        alive = _survives(key, begin + lane, last, cut) & (begin + lane < columns) & (key > found)
        if WEIGHTED:
            above += tl.where(alive, tl.exp(z - peak), 0.0).to(tl.float64)
        else:
            above += alive.to(tl.float64)
    before = tl.sum(above, axis=0)
    edge = found * 0 - 1
    rank = found * 0
    for begin in range(0, columns, BLOCK):
        z = _row(row_ptr, begin + lane, columns, temperature)
        key = _order_key(z)
        equal = _survives(key, begin + lane, last, cut) & (begin + lane < columns) & (key == found)
        place = rank + tl.cumsum(equal.to(tl.int64), axis=0) - 1
        one = tl.exp(z - peak).to(tl.float64) if WEIGHTED else tl.full((BLOCK,), 1.0, tl.float64)
        fits = equal & (before + place.to(tl.float64) * one < target)
        edge = tl.maximum(edge, tl.max(tl.where(fits, begin + lane, -1), axis=0).to(tl.int64))
        rank += tl.sum(equal.to(tl.int64), axis=0)
    return found, edge


@triton.jit(do_not_specialize=range(16), do_not_specialize_on_alignment=range(16))
def sample_tokens_kernel(
    logits_ptr,
    ids_ptr,
    positions_ptr,
    token_ptr,
    perturbed_ptr,
    logit_ptr,
    peak_ptr,
    total_ptr,
    row_stride,
    columns,
    start,
    seed,
    temperature,
    noisy,
    top_k,
    top_p,
    TRUNCATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * row_stride
    lane = tl.arange(0, BLOCK)
    key = row_key(seed, tl.load(ids_ptr + n), tl.load(positions_ptr + n))
    last = n * 0
    cut = last - 1
    if TRUNCATE:
        highs = tl.full((BLOCK,), -float("inf"), tl.float32)
        for begin in range(0, columns, BLOCK):
            highs = tl.maximum(highs, _row(row_ptr, begin + lane, columns, temperature))
        top = tl.max(highs, axis=0)
        top = tl.where(top == -float("inf"), 0.0, top)
        if top_k > 0:
            last, cut = _leading(row_ptr, columns, temperature, top, last, cut, top_k, False, BLOCK)
        if top_p < WHOLE:
            share = top_p.to(tl.float64) / WHOLE
            last, cut = _leading(row_ptr, columns, temperature, top, last, cut, share, True, BLOCK)

    best = tl.full((), -float("inf"), tl.float32)
    chosen = tl.full((), -float("inf"), tl.float32)
    token = last * 0 + start
    peak = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for begin in range(0, columns, BLOCK):
        at = begin + lane
        z = _row(row_ptr, at, columns, temperature)
        if TRUNCATE:
            z = tl.where(_survives(_order_key(z), at, last, cut), z, -float("inf"))
        perturbed = z
        if noisy > 0:
            perturbed = z + gumbel(candidate_hash(key, start + at))
        highest = tl.max(perturbed, axis=0)
        # Among equals the lowest id; of blocks, the first.
        column = tl.min(tl.where((perturbed == highest) & (at < columns), at, 2147483647), axis=0)
        better = highest > best
        chosen = tl.where(better, tl.max(tl.where(at == column, z, -float("inf")), axis=0), chosen)
        token = tl.where(better, column.to(tl.int64) + start, token)
        best = tl.maximum(best, highest)
        raised = tl.maximum(peak, tl.max(z, axis=0))
        finite = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp(peak - finite) + tl.sum(tl.exp(z - finite), axis=0)
        peak = raised
    tl.store(token_ptr + n, token)
    tl.store(perturbed_ptr + n, best)
    tl.store(logit_ptr + n, chosen)
    tl.store(peak_ptr + n, peak)
    tl.store(total_ptr + n, total)


@torch.no_grad()
def sample_tokens(
    logits_NV: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    sequence_ids: Tensor,
    positions: Tensor,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    sharded = shard is not None and shard.group is not None
    if temperature > 0 and sharded and (top_k or top_p < 1.0):
        # What survives is a question to all ranks; the answer costs scalars (reference_truncation), not logits.
        logits_NV, noisy = scaled_rows(logits_NV, temperature, top_k, top_p, shard), 1
        temperature, top_k, top_p = 1.0, 0, 1.0
    else:
        noisy = int(temperature > 0)
    if not noisy:
        temperature, top_k, top_p = 1.0, 0, 1.0
    N, device = logits_NV.shape[0], logits_NV.device
    columns = logits_NV.shape[1] if shard is None else shard.valid
    start = 0 if shard is None else shard.start
    token_N = torch.empty(N, dtype=torch.int64, device=device)
    statistics = torch.empty(4, N, dtype=torch.float32, device=device)
    rows = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    if N:
        with torch.cuda.device_of(rows):
            log_launch("sample_tokens_kernel", "triton")
            sample_tokens_kernel[(N,)](
                rows,
                sequence_ids.contiguous(),
                positions.contiguous(),
                token_N,
                *statistics,
                rows.stride(0),
                columns,
                start,
                (seed + (1 << 63)) % (1 << 64) - (1 << 63),
                temperature,
                noisy,
                top_k,
                round(top_p * WHOLE.value),
                TRUNCATE=bool(top_k or top_p < 1.0),
                BLOCK=BLOCK,
                **OPTIONS,
            )
    perturbed_N, logit_N, peak_N, total_N = statistics
    if not sharded:
        # The peak leaves first: added to log total, a peak of -1e4 would cost it four digits.
        inner_N = (logit_N - torch.where(peak_N == -torch.inf, 0.0, peak_N)) - total_N.log()
        return token_N, torch.where(logit_N == -torch.inf, logit_N, inner_N)
    if columns == 0:
        token_N.fill_(torch.iinfo(torch.int64).max)
    return merge_draws(Draw(perturbed_N, token_N, logit_N, peak_N.double() + total_N.double().log()), shard)
