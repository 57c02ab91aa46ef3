"""Layout-invariant sampling: the arg-max of logits plus Gumbel noise that depends on the token's coordinates alone.

The noise of a candidate is a hash of (seed, sequence id, position, global vocabulary id). Batch order, batch size and
the split of the vocabulary over ranks are not hashed, so the token does not depend on them. A rank sends its best
perturbed logit, that candidate's id and plain logit, and its log-sum-exp, never its logits; top-k and top-p send what
truncation.py describes.

The temperature divides what is left of a logit after the peak of its row, as in vocab_rows.py. Perturbed logits are
fp64 instead: the peak of a sharded row would cost one more gather, and 1e-12 of a quotient of -1e4 moves no arg-max.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.vocab_rows import local_rows
from ..types import VocabShard
from ..validate import wide_dtype
from .inputs import Distribution, Draw, NoiseKey, column, deliver
from .truncation import gather_ranks, truncate, truncate_sharded

# Legend
#   N  rows, one for each sequence             V  columns of this rank's slice, padding included
#   R  ranks of the shard's group              v  columns of this rank's slice that are vocabulary
#   W  32-bit words of the vocabulary
#   z  logits, -inf where they are not allowed or truncation drops them, [N, v] fp32 or fp64

# Odd multipliers of two hashes: splitmix64 (Steele, Lea and Flood 2014) for rows, and for candidates a 32-bit mixer in
# the style of MurmurHash3, half as wide because it runs once for each of N * V candidates.
_ROW_STEP, _ROW_A, _ROW_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ID_STEP, _ID_A, _ID_B = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


def _to_signed(x: int, bits: int) -> int:
    # The two's complement value of the low `bits` bits: torch has no arithmetic on unsigned integers.
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def _splitmix64(x: Tensor) -> Tensor:
    """Return splitmix64 of x in wrapping int64."""
    # >> of int64 is arithmetic: the masks clear the copies of the sign bit.
    x = x + _to_signed(_ROW_STEP, 64)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _to_signed(_ROW_A, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _to_signed(_ROW_B, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(seed: int | Tensor, sequence_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return two int32 keys per row [N]. The seed is a number, or int64 [N]."""
    # Chained, not added: sums of coordinates would give (id 1, position 2) and (id 2, position 1) the same noise.
    start = seed
    if not isinstance(start, Tensor):
        start = torch.full_like(sequence_ids, _to_signed(start, 64), dtype=torch.int64)
    key = _splitmix64(_splitmix64(_splitmix64(start) ^ sequence_ids.long()) ^ positions.long())
    return key.to(torch.int32), (key >> 32).to(torch.int32)


def _shift_xor_(x: Tensor, scratch: Tensor, shift: int) -> None:
    # x ^= x >> shift, with a logical shift.
    torch.bitwise_right_shift(x, shift, out=scratch)
    x ^= scratch.bitwise_and_((1 << (32 - shift)) - 1)


def candidate_bits(keys: tuple[Tensor, Tensor], start: int, size: int) -> Tensor:
    """Return the hash of each candidate, [N, size] int32 in [0, 2^31)."""
    ids = torch.arange(start, start + size, device=keys[0].device, dtype=torch.int64)
    ids = (ids * _ID_STEP).to(torch.int32)
    x = ids[None, :] + keys[0][:, None]
    # In place: at N * V entries each temporary of an expression costs as much as the logits.
    scratch = torch.empty_like(x)
    _shift_xor_(x, scratch, 16)
    x *= _to_signed(_ID_A, 32)
    x += keys[1][:, None]
    _shift_xor_(x, scratch, 15)
    x *= _to_signed(_ID_B, 32)
    _shift_xor_(x, scratch, 16)
    return x.bitwise_and_((1 << 31) - 1)


def exponential_noise(keys: tuple[Tensor, Tensor], start: int, size: int) -> Tensor:
    """Return draws from Exp(1), [N, size] fp32; minus their logarithm is Gumbel noise.

    The uniform u keeps all of 31 bits near 0, where -log1p(-u) is smallest. The smallest draw decides: coarse steps
    there would let ties favour low ids in a large vocabulary.
    """
    u = candidate_bits(keys, start, size).to(torch.float32)
    return u.add_(0.5).mul_(-(2.0**-31)).clamp_(min=-(1 - 2.0**-24)).log1p_().neg_()


def allowed_columns(allowed_NW: Tensor, start: int, size: int) -> Tensor:
    """Return whether each global id from `start` is allowed, [N, size] bool."""
    ids = torch.arange(start, start + size, device=allowed_NW.device)
    return (allowed_NW[:, ids >> 5] >> (ids & 31).int()) & 1 != 0


def merge_draws(local: Draw, temperature: float | Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return (token_N, logprob_N) of the full rows. One all-gather of four numbers per row, merged in fp64."""
    # An id is exact in fp64. The largest int64, of a rank without columns, rounds up and loses to every id.
    packed = torch.stack([x.double() for x in local])
    best_RN, token_RN, logit_RN, logsumexp_RN = gather_ranks(packed, shard).unbind(1)
    # Among equal maxima the lowest id wins, as on a single rank. NaN is the greatest, as in torch.max.
    token_N, rank_N = torch.where((best_RN == best_RN.amax(0)) | best_RN.isnan(), token_RN, torch.inf).min(0)
    logit_N = logit_RN.gather(0, rank_N[None]).squeeze(0)
    return token_N.long(), (logit_N / temperature - torch.logsumexp(logsumexp_RN, 0)).to(local.logit.dtype)


def sample_tokens(
    logits_NV: Tensor,
    distribution: Distribution,
    key: NoiseKey,
    shard: VocabShard | None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tokens and log-probs; see the public function."""
    with torch.no_grad():
        z = sampling_logits(logits_NV, distribution, shard)
        start = 0 if shard is None else shard.start
        # 1. Perturb. The noise is hashed from global ids, so a slice gets the noise of its own columns.
        perturbed, scale = z, distribution.scale
        if distribution.noisy and z.shape[1]:
            noise = exponential_noise(row_keys(key.seed, key.sequence_ids, key.positions), start, z.shape[1])
            # In fp64 the logarithm must be fp64 too.
            noise = noise.to(z.dtype).log_()
            if isinstance(distribution.temperature, Tensor):
                noise = torch.where(distribution.temperature[:, None] > 0, noise, 0.0)
            perturbed = z.to(torch.float64, copy=True).div_(column(scale)).sub_(noise)
        # 2. Take the maximum, of this rank or of all.
        if shard is None or shard.group is None:
            token_N = perturbed.max(dim=-1).indices  # the first of equal maxima
            logprob_N = local_rows(z, token_N, shard, scale, False).stats.logprob(scale)
        else:
            token_N, logprob_N = merge_draws(_best_candidate(z, perturbed, start, scale), scale, shard)
        return deliver(token_N, logprob_N, out)


def sampling_logits(logits_NV: Tensor, distribution: Distribution, shard: VocabShard | None) -> Tensor:
    """Return z: logits of valid columns, -inf where they are not allowed or truncation drops them."""
    if shard is not None:
        logits_NV = logits_NV[:, : shard.valid]
    z = logits_NV.to(wide_dtype(logits_NV))
    if distribution.allowed_NW is not None:
        start = 0 if shard is None else shard.start
        z = z.masked_fill(~allowed_columns(distribution.allowed_NW, start, z.shape[1]), -torch.inf)
    if distribution.truncates:
        if shard is None or shard.group is None:
            return truncate(z, distribution)
        return truncate_sharded(z, distribution, shard)
    return z


def _best_candidate(z: Tensor, perturbed: Tensor, start: int, temperature: float | Tensor) -> Draw:
    if z.shape[1] == 0:
        # A rank that has only padding takes part with a candidate that loses to every other.
        lowest = z.new_full((z.shape[0],), -torch.inf)
        token = torch.full_like(lowest, torch.iinfo(torch.int64).max, dtype=torch.int64)
        return Draw(lowest, token, lowest, lowest)
    best, index = perturbed.max(dim=-1)
    logsumexp = torch.logsumexp(z.double() / column(temperature), -1)
    return Draw(best, index + start, z.gather(1, index[:, None]).squeeze(1), logsumexp)
