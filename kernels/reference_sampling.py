"""Layout-invariant sampling: the arg-max of logits plus Gumbel noise that depends on nothing but who is asking.

The noise of a candidate is a hash of (seed, sequence id, position, global vocabulary id). Batch order, batch size and
the split of the vocabulary over ranks do not enter, so neither do they enter the token. Ranks exchange (maximum, id)
and the statistics of the row; top-k and top-p, which are for evaluation, gather the whole row instead.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import wide_dtype
from .reference_rows import local_rows, merge_rows
from .types import VocabShard

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


def exponential_noise(keys: tuple[Tensor, Tensor], start: int, size: int) -> Tensor:
    """[N, size] fp32 draws from Exp(1); minus their logarithm is Gumbel noise.

    The uniform keeps all of 31 bits near 0, where -log1p(-u) is smallest: the smallest draw decides, and coarse steps
    there would let ties favour low ids in a large vocabulary.
    """
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
    u = x.bitwise_and_((1 << 31) - 1).to(torch.float32)
    return u.add_(0.5).mul_(-(2.0**-31)).clamp_(min=-(1 - 2.0**-24)).log1p_().neg_()


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
        if (top_k or top_p < 1.0) and shard is not None and shard.group is not None:
            logits_NV, shard = _gather_rows(logits_NV, shard), None
        if shard is not None:
            logits_NV = logits_NV[:, : shard.valid]
        z = logits_NV.to(wide_dtype(logits_NV))
        if temperature > 0 and temperature != 1.0:
            z = z / temperature
        if temperature > 0 and (top_k or top_p < 1.0):
            z = _truncate(z, top_k, top_p)
        start = 0 if shard is None else shard.start
        perturbed = z
        if temperature > 0 and z.shape[1]:
            noise = exponential_noise(row_keys(seed, sequence_ids, positions), start, z.shape[1])
            perturbed = noise.log_().neg_().add_(z) if z.dtype == torch.float32 else z - noise.to(z.dtype).log()
        token_N = _argmax(perturbed, start, shard)
        local, _, _ = local_rows(z, token_N, shard, False)
        return token_N, merge_rows(local, shard).logprob()


def _argmax(perturbed: Tensor, start: int, shard: VocabShard | None) -> Tensor:
    """Global id of each row's maximum, the lowest id among equals."""
    if perturbed.shape[1]:
        best, token = perturbed.max(dim=-1)  # max returns the first of equal maxima
        token = token + start
    else:
        best = perturbed.new_full((perturbed.shape[0],), -torch.inf)
        token = torch.full_like(best, torch.iinfo(torch.int64).max, dtype=torch.int64)
    if shard is None or shard.group is None:
        return token
    ranks = dist.get_world_size(shard.group)
    bests, tokens = [torch.empty_like(best) for _ in range(ranks)], [torch.empty_like(token) for _ in range(ranks)]
    dist.all_gather(bests, best, group=shard.group)
    dist.all_gather(tokens, token, group=shard.group)
    best_RN, token_RN = torch.stack(bests), torch.stack(tokens)
    tied = best_RN == best_RN.amax(0)
    return torch.where(tied, token_RN, torch.iinfo(torch.int64).max).amin(0)


def _truncate(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k largest, then outside the smallest set of mass >= top_p; equals keep the lowest ids."""
    ordered, index = torch.sort(z, dim=-1, descending=True, stable=True)
    if top_k and top_k < z.shape[1]:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1.0:
        mass = torch.softmax(ordered, dim=-1)
        before = mass.cumsum(-1) - mass
        drop = before >= top_p
        drop[:, 0] = False
        ordered = ordered.masked_fill(drop, -torch.inf)
    return torch.empty_like(z).scatter_(1, index, ordered)


def _gather_rows(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """The whole row in vocabulary order, padding dropped; slices may differ in size."""
    ranks = dist.get_world_size(shard.group)
    mine = torch.tensor([shard.start, shard.valid], device=logits_NV.device)
    places = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(places, mine, group=shard.group)
    extents = [tuple(p.tolist()) for p in places]
    widest = max(size for _, size in extents)
    padded = logits_NV.new_zeros(logits_NV.shape[0], widest)
    padded[:, : shard.valid] = logits_NV[:, : shard.valid]
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=shard.group)
    by_start = sorted(zip(extents, parts, strict=True), key=lambda item: item[0][0])
    return torch.cat([part[:, :size] for (_, size), part in by_start], dim=1)
