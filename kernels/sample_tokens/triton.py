"""sample_tokens in Triton: one program per row reads it once for the draw and the log-prob of what was drawn.

The hash of a candidate is that of reference.py, bit for bit. Unlike there, -log1p(-u) is log(1 - u) rescaled by
u / (1 - (1 - u)), which undoes the rounding of 1 - u (Kahan), and the log-sum-exp is computed online with the maximum.
top-k and top-p need no sort: the last value that is kept is found bit by bit, with a count or a mass over the row in
each of 32 steps (the row stays in the cache), and an id settles its equals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator, tensor_bytes
from ..common.vocab_rows import label_logprob
from ..dispatch import log_launch
from ..types import VocabShard
from .inputs import Distribution, Draw, NoiseKey
from .reference import merge_draws, sampling_logits

# Legend
#   N  rows, one for each program              V  columns of this rank's slice, padding included
#   columns  columns that are vocabulary       start  global id of the first of them
#   z        logits, fp32                      key    order key (int64) or hash key (uint64)
#   (last_key, last_id)  a column survives truncation if its key is above last_key, or equal with an id <= last_id

# Wide blocks: one program has a row, and every block costs it several reductions over all its warps.
# Triton 3.6 and 3.9 spill registers at this width with 8 warps, and narrower blocks spill on sm_80, sm_90 or sm_100.
BLOCK = 4096
OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}
# top_p is passed in units of 2^-53: Triton passes a float argument as fp32, and the rounding would show at a tie.
TOP_P_UNITS = tl.constexpr(1 << 53)
# For the declared cost. Passes over a row that one truncation takes: 32 steps of the search, and one for the last id.
TRUNCATION_PASSES = 33
# Operations per column and pass: the hash, two logarithms, maximum and log-sum-exp of a draw; a comparison and a sum.
DRAW_FLOPS, TRUNCATION_FLOPS = 35, 6


@triton.jit
def _splitmix64(x):
    """Return splitmix64 of a uint64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_key(seed, sequence_id, position):
    """Return one uint64 per row; its halves key the candidates."""
    key = _splitmix64(seed.to(tl.int64).to(tl.uint64)) ^ sequence_id.to(tl.int64).to(tl.uint64)
    return _splitmix64(_splitmix64(key) ^ position.to(tl.int64).to(tl.uint64))


@triton.jit
def candidate_hash(key, ids):
    """Return the hash of each candidate, uint32 below 2^31."""
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
    """Return Gumbel noise from 31 random bits."""
    # 1. A uniform in (0, 1): the constants are 2^-31 and the largest fp32 below 1.
    v = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994039535522)
    # 2. -log1p(-v), an Exp(1) draw: log(w) is that of the rounded w = 1 - v, and v / (1 - w) corrects it.
    w = 1.0 - v
    rounded_v = 1.0 - w
    exponential = tl.where(rounded_v == 0.0, v, -tl.log(w) * (v / tl.where(rounded_v == 0.0, 1.0, rounded_v)))
    return -tl.log(exponential)


@triton.jit
def _load_z(row_ptr, column, columns):
    """Return logits, -inf beyond the vocabulary."""
    return tl.load(row_ptr + column, mask=column < columns, other=-float("inf")).to(tl.float32)


@triton.jit
def _over_temperature(shifted, temperature):
    """Return differences of logits over the temperature."""
    # div_rn is IEEE division, as PyTorch's: the default division rounds differently.
    return tl.div_rn(shifted, tl.full(shifted.shape, 0.0, tl.float32) + temperature)


@triton.jit
def _mass(shifted, temperature):
    """Return exp(shifted / temperature) in fp64."""
    return tl.exp(_over_temperature(shifted, temperature)).to(tl.float64)


@triton.jit
def _order_key(z):
    """Return int64 keys in [0, 2^32) that order as z does."""
    # Adding 0.0 turns -0.0 into 0.0; negative floats order backwards by their bits, so all but the sign flips.
    bits = (z + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2147483648


@triton.jit
def _survives(key, column, last_key, last_id):
    """Return whether a column is at or before the last that truncation keeps."""
    return (key > last_key) | ((key == last_key) & (column <= last_id))


@triton.jit
def _narrow_to_target(
    row_ptr, columns, temperature, row_max, last_key, last_id, target, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return (last_key, last_id) narrowed to the columns before which less than `target` lies.

    `target` is a number of columns, or if WEIGHTED a share of the mass of what survived so far.
    """
    lane = tl.arange(0, BLOCK)
    # 1. Turn the share into a mass.
    if WEIGHTED:
        mass = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, columns, BLOCK):
            z = _load_z(row_ptr, begin + lane, columns)
            alive = _survives(_order_key(z), begin + lane, last_key, last_id) & (begin + lane < columns)
            mass += tl.where(alive, _mass(z - row_max, temperature), 0.0)
        target = target * tl.sum(mass, axis=0)
    # 2. The key of the last value that is kept, bit by bit from the highest of 32.
    new_key = last_key * 0
    step = new_key + 2147483648
    while step > 0:
        raised = new_key + step
        mass = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, columns, BLOCK):
            z = _load_z(row_ptr, begin + lane, columns)
            key = _order_key(z)
            alive = _survives(key, begin + lane, last_key, last_id) & (begin + lane < columns) & (key >= raised)
            if WEIGHTED:
                mass += tl.where(alive, _mass(z - row_max, temperature), 0.0)
            else:
                mass += alive.to(tl.float64)
        new_key = tl.where(tl.sum(mass, axis=0) >= target, raised, new_key)
        step = step // 2
    # 3. What lies above that value.
    above = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, columns, BLOCK):
        z = _load_z(row_ptr, begin + lane, columns)
        key = _order_key(z)
        alive = _survives(key, begin + lane, last_key, last_id) & (begin + lane < columns) & (key > new_key)
        if WEIGHTED:
            above += tl.where(alive, _mass(z - row_max, temperature), 0.0)
        else:
            above += alive.to(tl.float64)
    before = tl.sum(above, axis=0)
    # 4. Its equals, in the order of their ids, as long as they fit.
    new_id = new_key * 0 - 1
    equals_before = new_key * 0
    for begin in range(0, columns, BLOCK):
        z = _load_z(row_ptr, begin + lane, columns)
        key = _order_key(z)
        equal = _survives(key, begin + lane, last_key, last_id) & (begin + lane < columns) & (key == new_key)
        rank = equals_before + tl.cumsum(equal.to(tl.int64), axis=0) - 1
        one = _mass(z - row_max, temperature) if WEIGHTED else tl.full((BLOCK,), 1.0, tl.float64)
        fits = equal & (before + rank.to(tl.float64) * one < target)
        new_id = tl.maximum(new_id, tl.max(tl.where(fits, begin + lane, -1), axis=0).to(tl.int64))
        equals_before += tl.sum(equal.to(tl.int64), axis=0)
    return new_key, new_id


# One binary serves every size, alignment and setting: compiling per value would stall a decode step.
@triton.jit(do_not_specialize=range(16), do_not_specialize_on_alignment=range(16))
def sample_tokens_kernel(
    logits_ptr,
    ids_ptr,
    positions_ptr,
    token_ptr,
    perturbed_ptr,
    logit_ptr,
    max_ptr,
    sum_exp_ptr,
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
    """Write the token of one row, its perturbed and plain logit, and the maximum and exponential sum of the row."""
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * row_stride
    lane = tl.arange(0, BLOCK)
    key = row_key(seed, tl.load(ids_ptr + n), tl.load(positions_ptr + n))
    last_key = n * 0
    last_id = last_key - 1
    # 1. Truncation: find the last column that is kept. The maximum is a reference point for the masses.
    if TRUNCATE:
        maxima = tl.full((BLOCK,), -float("inf"), tl.float32)
        for begin in range(0, columns, BLOCK):
            maxima = tl.maximum(maxima, _load_z(row_ptr, begin + lane, columns))
        row_max = tl.max(maxima, axis=0)
        row_max = tl.where(row_max == -float("inf"), 0.0, row_max)
        if top_k > 0:
            last_key, last_id = _narrow_to_target(
                row_ptr, columns, temperature, row_max, last_key, last_id, top_k, False, BLOCK
            )
        # Widened first: Triton passes a top_p below 2.4e-7 as int32, which 2^53 does not fit.
        top_p = top_p.to(tl.int64)
        if top_p < TOP_P_UNITS:
            share = top_p.to(tl.float64) / TOP_P_UNITS
            last_key, last_id = _narrow_to_target(
                row_ptr, columns, temperature, row_max, last_key, last_id, share, True, BLOCK
            )

    # 2. One pass: the best perturbed logit in fp64, and the log-sum-exp of the plain ones.
    inverse_temperature = 1.0 / (tl.full((), 0.0, tl.float64) + temperature)
    best = tl.full((), -float("inf"), tl.float64)
    best_logit = tl.full((), -float("inf"), tl.float32)
    token = last_key * 0 + start
    online_max = tl.full((), -float("inf"), tl.float32)
    sum_exp = tl.full((), 0.0, tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + lane
        z = _load_z(row_ptr, column, columns)
        if TRUNCATE:
            z = tl.where(_survives(_order_key(z), column, last_key, last_id), z, -float("inf"))
        perturbed = z.to(tl.float64)
        if noisy > 0:
            perturbed = perturbed * inverse_temperature + gumbel(candidate_hash(key, start + column)).to(tl.float64)
        highest = tl.max(perturbed, axis=0)
        # Among equals the lowest id of the block, and of blocks the first.
        best_column = tl.min(tl.where((perturbed == highest) & (column < columns), column, 2147483647), axis=0)
        better = highest > best
        best_logit = tl.where(better, tl.max(tl.where(column == best_column, z, -float("inf")), axis=0), best_logit)
        token = tl.where(better, best_column.to(tl.int64) + start, token)
        best = tl.maximum(best, highest)
        # Online log-sum-exp: -inf is never subtracted from itself.
        new_max = tl.maximum(online_max, tl.max(z, axis=0))
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        sum_exp *= tl.exp((online_max - safe_max) / temperature)
        sum_exp += tl.sum(tl.exp(_over_temperature(z - safe_max, temperature)), axis=0)
        online_max = new_max
    tl.store(token_ptr + n, token)
    tl.store(perturbed_ptr + n, best)
    tl.store(logit_ptr + n, best_logit)
    tl.store(max_ptr + n, online_max)
    tl.store(sum_exp_ptr + n, sum_exp)


@torch.no_grad()
def sample_tokens(
    logits_NV: Tensor, distribution: Distribution, key: NoiseKey, shard: VocabShard | None
) -> tuple[Tensor, Tensor]:
    """Return tokens and log-probs; see the public function."""
    sharded = shard is not None and shard.group is not None
    noisy = distribution.temperature > 0
    # 1. Truncation over a sharded vocabulary needs all ranks: torch exchanges scalars (truncation.py), then the kernel
    #    samples from what is left. The arg-max at temperature 0 needs neither temperature nor truncation.
    if sharded and distribution.truncates:
        logits_NV = sampling_logits(logits_NV, distribution, shard)
        distribution = Distribution(distribution.temperature, 0, 1.0)
    elif not noisy:
        distribution = Distribution(1.0, 0, 1.0)
    # 2. Launch.
    N, device = logits_NV.shape[0], logits_NV.device
    columns = logits_NV.shape[1] if shard is None else shard.valid
    start = 0 if shard is None else shard.start
    token_N = torch.empty(N, dtype=torch.int64, device=device)
    perturbed_N = torch.empty(N, dtype=torch.float64, device=device)
    statistics = torch.empty(3, N, dtype=torch.float32, device=device)
    rows = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    if N:
        _sample_step(
            rows,
            key.sequence_ids.contiguous(),
            key.positions.contiguous(),
            token_N,
            perturbed_N,
            statistics,
            columns,
            start,
            # The seed modulo 2^64, as the signed integer with the same bits.
            (key.seed + (1 << 63)) % (1 << 64) - (1 << 63),
            distribution.temperature,
            noisy,
            distribution.top_k,
            distribution.top_p,
        )
    # 3. Log-probs, of this rank's rows or after the merge of all ranks' candidates.
    logit_N, max_N, sum_exp_N = statistics
    temperature = distribution.scale
    if shard is None or shard.group is None:
        return token_N, label_logprob(logit_N, max_N, sum_exp_N, temperature)
    if columns == 0:
        token_N.fill_(torch.iinfo(torch.int64).max)
    logsumexp_N = max_N.double() / temperature + sum_exp_N.double().log()
    return merge_draws(Draw(perturbed_N, token_N, logit_N, logsumexp_N), temperature, shard)


def _sample_cost(
    logits_NV: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    token_N: Tensor,
    perturbed_N: Tensor,
    statistics_3N: Tensor,
    columns: int,
    start: int,
    seed: int,
    temperature: float,
    noisy: bool,
    top_k: int,
    top_p: float,
) -> Cost:
    truncations = ((top_k > 0) + (top_p < 1.0)) if noisy else 0
    elements = logits_NV.shape[0] * columns
    # The passes of a truncation read the row from the cache.
    read = elements * logits_NV.element_size() + tensor_bytes(sequence_ids) + tensor_bytes(positions)
    flops = elements * (DRAW_FLOPS + truncations * TRUNCATION_PASSES * TRUNCATION_FLOPS)
    return Cost(1, flops, read, sum(map(tensor_bytes, (token_N, perturbed_N, statistics_3N))))


@device_operator(
    "sample_tokens_kernel(Tensor logits, Tensor sequence_ids, Tensor positions, Tensor(a!) token, "
    "Tensor(b!) perturbed, Tensor(c!) statistics, int columns, int start, int seed, float temperature, bool noisy, "
    "int top_k, float top_p)",
    _sample_cost,
)
def _sample_step(
    logits_NV: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    token_N: Tensor,
    perturbed_N: Tensor,
    statistics_3N: Tensor,
    columns: int,
    start: int,
    seed: int,
    temperature: float,
    noisy: bool,
    top_k: int,
    top_p: float,
) -> None:
    with torch.cuda.device_of(logits_NV):
        log_launch("sample_tokens_kernel", "triton")
        sample_tokens_kernel[(logits_NV.shape[0],)](
            logits_NV,
            sequence_ids,
            positions,
            token_N,
            perturbed_N,
            *statistics_3N,
            logits_NV.stride(0),
            columns,
            start,
            seed,
            temperature,
            int(noisy),
            top_k,
            round(top_p * TOP_P_UNITS.value),
            TRUNCATE=noisy and (top_k > 0 or top_p < 1.0),
            BLOCK=BLOCK,
            **OPTIONS,
        )
