"""Layout-invariant sampling: the arg-max of logits plus Gumbel noise that depends on nothing but who is asking.

The noise of a candidate is a hash of (seed, sequence id, position, global vocabulary id). Batch order, batch size and
the split of the vocabulary over ranks do not enter, so neither do they enter the token. A rank sends its best perturbed
logit, that candidate's id and plain logit, and its log-sum-exp, never its logits; what top-k and top-p need besides is
in reference_truncation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.vocab_rows import local_rows
from ..types import VocabShard
from ..validate import wide_dtype
from .truncation import gather_ranks, truncate, truncate_sharded

_WORD = 1 << 64
# Odd multipliers of the two hashes: splitmix64 (Steele et al. 2014) for rows, a 32-bit murmur-style one for candidates.
_ROW_STEP, _ROW_A, _ROW_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ID_STEP, _ID_A, _ID_B = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


def _signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser in wrapping int64; >> is arithmetic, so the copied sign bits are masked off."""
    x = x + _signed(_ROW_STEP, 64)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_ROW_A, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_ROW_B, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_keys(seed: int, sequence_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 keys per row."""
    start = torch.full_like(sequence_ids, _signed(seed % _WORD, 64), dtype=torch.int64)
    key = _mix64(_mix64(_mix64(start) ^ sequence_ids.long()) ^ positions.long())
    return key.to(torch.int32), (key >> 32).to(torch.int32)


def _shift_xor_(x: Tensor, scratch: Tensor, shift: int) -> None:
    torch.bitwise_right_shift(x, shift, out=scratch)
    x ^= scratch.bitwise_and_((1 << (32 - shift)) - 1)


def candidate_bits(keys: tuple[Tensor, Tensor], start: int, size: int) -> Tensor:
    """[N, size] int32 in [0, 2^31): the hash of each candidate."""
    ids = torch.arange(start, start + size, device=keys[0].device, dtype=torch.int64)
    ids = (ids * _ID_STEP).to(torch.int32)
    x = ids[None, :] + keys[0][:, None]
    scratch = torch.empty_like(x)
    _shift_xor_(x, scratch, 16)
    x *= _signed(_ID_A, 32)
    x += keys[1][:, None]
    _shift_xor_(x, scratch, 15)
    x *= _signed(_ID_B, 32)
    _shift_xor_(x, scratch, 16)
    return x.bitwise_and_((1 << 31) - 1)


def exponential_noise(keys: tuple[Tensor, Tensor], start: int, size: int) -> Tensor:
    """[N, size] fp32 draws from Exp(1); minus their logarithm is Gumbel noise.

    The uniform keeps all of 31 bits near 0, where -log1p(-u) is smallest: the smallest draw decides, and coarse steps
    there would let ties favour low ids in a large vocabulary.
    """
    u = candidate_bits(keys, start, size).to(torch.float32)
    return u.add_(0.5).mul_(-(2.0**-31)).clamp_(min=-(1 - 2.0**-24)).log1p_().neg_()


@dataclass(frozen=True)
class Draw:
    """What a rank knows of each row [N] from its own columns: the best perturbed logit, its global id (the largest
    int64 where there is no column), its own logit, and the log-sum-exp of the columns."""

    perturbed: Tensor
    token: Tensor
    logit: Tensor
    lse: Tensor


def merge_draws(mine: Draw, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """(token_N, logprob_N) of the whole rows. One gather of four numbers per row, merged in rank order in fp64."""
    # An id is exact in fp64; the largest int64 of a rank without columns rounds, and loses to every id.
    packed = torch.stack([x.double() for x in (mine.perturbed, mine.token, mine.logit, mine.lse)])
    best_RN, token_RN, logit_RN, lse_RN = gather_ranks(packed, shard).unbind(1)
    token_N, rank_N = torch.where(best_RN == best_RN.amax(0), token_RN, torch.inf).min(0)
    logit_N = logit_RN.gather(0, rank_N[None]).squeeze(0)
    return token_N.long(), (logit_N - torch.logsumexp(lse_RN, 0)).to(mine.logit.dtype)


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
    with torch.no_grad():
        z = scaled_rows(logits_NV, temperature, top_k, top_p, shard)
        start = 0 if shard is None else shard.start
        perturbed = z
        if temperature > 0 and z.shape[1]:
            noise = exponential_noise(row_keys(seed, sequence_ids, positions), start, z.shape[1])
            perturbed = noise.log_().neg_().add_(z) if z.dtype == torch.float32 else z - noise.to(z.dtype).log()
        if shard is None or shard.group is None:
            token_N = perturbed.max(dim=-1).indices  # the first of equal maxima
            return token_N, local_rows(z, token_N, shard, False)[0].logprob()
        return merge_draws(_draw(z, perturbed, start), shard)


def scaled_rows(logits_NV: Tensor, temperature: float, top_k: int, top_p: float, shard: VocabShard | None) -> Tensor:
    """Valid columns over the temperature, -inf where top-k or top-p drops them: the log-weights that are sampled
    from."""
    if shard is not None:
        logits_NV = logits_NV[:, : shard.valid]
    z = logits_NV.to(wide_dtype(logits_NV))
    if temperature > 0 and temperature != 1.0:
        z = z / temperature
    if temperature > 0 and (top_k or top_p < 1.0):
        if shard is None or shard.group is None:
            return truncate(z, top_k, top_p)
        return truncate_sharded(z, top_k, top_p, shard)
    return z


def _draw(z: Tensor, perturbed: Tensor, start: int) -> Draw:
    if z.shape[1] == 0:
        nothing = z.new_full((z.shape[0],), -torch.inf)
        token = torch.full_like(nothing, torch.iinfo(torch.int64).max, dtype=torch.int64)
        return Draw(nothing, token, nothing, nothing)
    best, column = perturbed.max(dim=-1)
    return Draw(best, column + start, z.gather(1, column[:, None]).squeeze(1), torch.logsumexp(z.double(), -1))
