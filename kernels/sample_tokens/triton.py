"""sample_tokens in Triton: one program per row reads it once for the draw and the log-prob of what was drawn.

The hash of a candidate is that of reference.py, bit for bit. Unlike there, -log1p(-u) is log(1 - u) rescaled by
u / (1 - (1 - u)), which undoes the rounding of 1 - u (Kahan), and the log-sum-exp is computed online with the maximum.
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
from .inputs import Distribution, Draw, NoiseKey, deliver
from .reference import merge_draws, sampling_logits
from .triton_row import (
    UNITS,
    candidate_hash,
    gumbel,
    load_setting,
    load_z,
    narrow_to_target,
    order_key,
    over_temperature,
    row_key,
    share_of,
    survives,
)

# Legend
#   N  rows, one for each program              V  columns of this rank's slice, padding included
#   columns  columns that are vocabulary       start  global id of the first of them
#   z        logits, fp32                      key    order key (int64) or hash key (uint64)
#   (last_key, last_id)  a column survives truncation if its key is above last_key, or equal with an id <= last_id
#   allowed  a row's words of 32 bits, one bit for each global id
# Settings are numbers, or pointers to one for each row (*_BY_ROW).

# Wide blocks: one program has a row, and every block costs it several reductions over all its warps.
# Triton 3.6 and 3.9 spill registers at this width with 8 warps, and narrower blocks spill on sm_80, sm_90 or sm_100.
BLOCK = 4096
OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}
# For the declared cost. Passes over a row that one truncation takes: 32 steps of the search, and one for the last id.
TRUNCATION_PASSES = 33
# Operations per column and pass: the hash, two logarithms, maximum and log-sum-exp of a draw; a comparison and a sum.
DRAW_FLOPS, TRUNCATION_FLOPS = 35, 6


# One binary serves every size, alignment and setting: compiling per value would stall a decode step.
@triton.jit(do_not_specialize=range(18), do_not_specialize_on_alignment=range(18))
def sample_tokens_kernel(
    logits_ptr,
    ids_ptr,
    positions_ptr,
    allowed_ptr,
    token_ptr,
    perturbed_ptr,
    logit_ptr,
    max_ptr,
    sum_exp_ptr,
    row_stride,
    allowed_stride,
    columns,
    start,
    seed,
    temperature,
    top_k,
    top_p,
    min_p,
    SEED_BY_ROW: tl.constexpr,
    TEMPERATURE_BY_ROW: tl.constexpr,
    TOP_K_BY_ROW: tl.constexpr,
    TOP_P_BY_ROW: tl.constexpr,
    MIN_P_BY_ROW: tl.constexpr,
    ALLOWED: tl.constexpr,
    TRUNCATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the token of one row, its perturbed and plain logit, and the maximum and exponential sum of the row."""
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * row_stride
    allowed_ptr += n * allowed_stride
    lane = tl.arange(0, BLOCK)
    key = row_key(load_setting(seed, n, SEED_BY_ROW), tl.load(ids_ptr + n), tl.load(positions_ptr + n))
    temperature = tl.full((), 0.0, tl.float32) + load_setting(temperature, n, TEMPERATURE_BY_ROW)
    noisy = temperature > 0
    temperature = tl.where(noisy, temperature, 1.0)
    last_key = n * 0
    last_id = last_key - 1
    # 1. Truncation: find the last column that is kept. The maximum is a reference point for the masses.
    lowest = tl.full((), -float("inf"), tl.float64)
    if TRUNCATE:
        maxima = tl.full((BLOCK,), -float("inf"), tl.float32)
        for begin in range(0, columns, BLOCK):
            maxima = tl.maximum(maxima, load_z(row_ptr, begin + lane, columns, start, allowed_ptr, ALLOWED))
        row_max = tl.max(maxima, axis=0)
        row_max = tl.where(row_max == -float("inf"), 0.0, row_max)
        top_k = load_setting(top_k, n, TOP_K_BY_ROW)
        if noisy & (top_k > 0):
            last_key, last_id = narrow_to_target(
                row_ptr,
                columns,
                start,
                allowed_ptr,
                temperature,
                row_max,
                last_key,
                last_id,
                top_k,
                False,
                ALLOWED,
                BLOCK,
            )
        share = share_of(load_setting(top_p, n, TOP_P_BY_ROW), TOP_P_BY_ROW)
        if noisy & (share < 1.0):
            last_key, last_id = narrow_to_target(
                row_ptr,
                columns,
                start,
                allowed_ptr,
                temperature,
                row_max,
                last_key,
                last_id,
                share,
                True,
                ALLOWED,
                BLOCK,
            )
        floor_share = share_of(load_setting(min_p, n, MIN_P_BY_ROW), MIN_P_BY_ROW)
        if noisy & (floor_share > 0):
            lowest = row_max.to(tl.float64) + temperature.to(tl.float64) * tl.log(floor_share)

    # 2. One pass: the best perturbed logit in fp64, and the log-sum-exp of the plain ones.
    inverse_temperature = 1.0 / temperature.to(tl.float64)
    best = tl.full((), -float("inf"), tl.float64)
    best_logit = tl.full((), -float("inf"), tl.float32)
    token = last_key * 0 + start
    online_max = tl.full((), -float("inf"), tl.float32)
    sum_exp = tl.full((), 0.0, tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + lane
        z = load_z(row_ptr, column, columns, start, allowed_ptr, ALLOWED)
        if TRUNCATE:
            kept = survives(order_key(z), column, last_key, last_id) & (z.to(tl.float64) >= lowest)
            z = tl.where(kept, z, -float("inf"))
        perturbed = z.to(tl.float64)
        if noisy:
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
        sum_exp += tl.sum(tl.exp(over_temperature(z - safe_max, temperature)), axis=0)
        online_max = new_max
    tl.store(token_ptr + n, token)
    tl.store(perturbed_ptr + n, best)
    tl.store(logit_ptr + n, best_logit)
    tl.store(max_ptr + n, online_max)
    tl.store(sum_exp_ptr + n, sum_exp)


@torch.no_grad()
def sample_tokens(
    logits_NV: Tensor,
    distribution: Distribution,
    key: NoiseKey,
    shard: VocabShard | None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tokens and log-probs; see the public function."""
    sharded = shard is not None and shard.group is not None
    # 1. Truncation over a sharded vocabulary needs all ranks: torch exchanges scalars (truncation.py), then the kernel
    #    samples from what is left.
    if sharded and distribution.truncates:
        logits_NV = sampling_logits(logits_NV, distribution, shard)
        distribution = distribution.without_truncation()
    # 2. Launch.
    N, device = logits_NV.shape[0], logits_NV.device
    columns = logits_NV.shape[1] if shard is None else min(logits_NV.shape[1], shard.valid)
    start = 0 if shard is None else shard.start
    token_N = out[0] if out else torch.empty(N, dtype=torch.int64, device=device)
    perturbed_N = torch.empty(N, dtype=torch.float64, device=device)
    statistics = torch.empty(3, N, dtype=torch.float32, device=device)
    rows = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    if N:
        coordinates = (key.sequence_ids.contiguous(), key.positions.contiguous())
        settings = (key.signed_seed, distribution.temperature, distribution.top_k, distribution.top_p)
        numbers, by_row = _as_arguments((*settings, distribution.min_p))
        results = (token_N, perturbed_N, statistics)
        _sample_step(rows, *coordinates, distribution.allowed_NW, by_row, *results, columns, start, *numbers)
    # 3. Log-probs, of this rank's rows or after the merge of all ranks' candidates.
    logit_N, max_N, sum_exp_N = statistics
    temperature = distribution.scale
    if not sharded:
        logprob_N = label_logprob(logit_N, max_N, sum_exp_N, temperature)
        return token_N, logprob_N if out is None else out[1].copy_(logprob_N)
    if columns == 0:
        token_N.fill_(torch.iinfo(torch.int64).max)
    logsumexp_N = max_N.double() / temperature + sum_exp_N.double().log()
    assert shard is not None
    return deliver(*merge_draws(Draw(perturbed_N, token_N, logit_N, logsumexp_N), temperature, shard), out)


def _as_arguments(settings: tuple[float | Tensor, ...]) -> tuple[list[float], list[Tensor | None]]:
    """Return settings as an operator takes them: numbers, and a tensor where a setting is one by row."""
    tensors = [x.contiguous() if isinstance(x, Tensor) else None for x in settings]
    # A setting by row has a number too, which says that it may truncate.
    unknown = (0, 1.0, 1, 0.5, 0.5)
    return [n if isinstance(x, Tensor) else x for x, n in zip(settings, unknown, strict=True)], tensors


def _truncations(temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """Return the searches that a row may need, and one more if min_p needs the maximum."""
    return (top_k > 0) + (top_p < 1.0) + (min_p > 0) if temperature > 0 else 0


def _sample_cost(
    logits_NV: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    allowed_NW: Tensor | None,
    by_row: list[Tensor | None],
    token_N: Tensor,
    perturbed_N: Tensor,
    statistics_3N: Tensor,
    columns: int,
    start: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Cost:
    searches = ((top_k > 0) + (top_p < 1.0)) if temperature > 0 else 0
    N = logits_NV.shape[0]
    elements = N * columns
    # The passes of a truncation read the row from the cache.
    words = 0 if allowed_NW is None or not columns else (start + columns - 1) // 32 - start // 32 + 1
    read = elements * logits_NV.element_size() + sum(map(tensor_bytes, (sequence_ids, positions, *by_row)))
    flops = elements * (DRAW_FLOPS + searches * TRUNCATION_PASSES * TRUNCATION_FLOPS)
    return Cost(1, flops, read + 4 * N * words, sum(map(tensor_bytes, (token_N, perturbed_N, statistics_3N))))


@device_operator(
    "sample_tokens_kernel(Tensor logits, Tensor sequence_ids, Tensor positions, Tensor? allowed, Tensor?[] by_row, "
    "Tensor(a!) token, Tensor(b!) perturbed, Tensor(c!) statistics, int columns, int start, int seed, "
    "float temperature, int top_k, float top_p, float min_p)",
    _sample_cost,
)
def _sample_step(
    logits_NV: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    allowed_NW: Tensor | None,
    by_row: list[Tensor | None],
    token_N: Tensor,
    perturbed_N: Tensor,
    statistics_3N: Tensor,
    columns: int,
    start: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    units = (round(top_p * UNITS.value), round(min_p * UNITS.value))
    numbers = (seed, temperature, top_k, *units)
    with torch.cuda.device_of(logits_NV):
        log_launch("sample_tokens_kernel", "triton")
        sample_tokens_kernel[(logits_NV.shape[0],)](
            logits_NV,
            sequence_ids,
            positions,
            sequence_ids if allowed_NW is None else allowed_NW,
            token_N,
            perturbed_N,
            *statistics_3N,
            logits_NV.stride(0),
            0 if allowed_NW is None else allowed_NW.stride(0),
            columns,
            start,
            *(x if by is None else by for x, by in zip(numbers, by_row, strict=True)),
            *(x is not None for x in by_row),
            ALLOWED=allowed_NW is not None,
            TRUNCATE=_truncations(temperature, top_k, top_p, min_p) > 0,
            BLOCK=BLOCK,
            **OPTIONS,
        )
