"""top-k and top-p in plain PyTorch: by sorting where the row is whole, by a search over thresholds where it is not.

Both keep the top_k largest, then of those the smallest set of mass >= top_p; among equals the lowest ids stay. Masses
are fp64, so that the two ways disagree only where a mass lies within 1e-15 of top_p. Over a sharded vocabulary no
logit travels: 32 rounds find the last value that is kept, bit by bit, with one number per row and rank in each, and
one round of three numbers settles its equals. top_k and top_p together: 66 small gathers and one of peaks, whatever
the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import VocabShard


def truncate(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """z [N, V] with -inf in the columns that are dropped."""
    ordered, index = torch.sort(z, dim=-1, descending=True, stable=True)
    if top_k and top_k < z.shape[1]:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1.0:
        mass = torch.softmax(ordered.double(), dim=-1)
        drop = mass.cumsum(-1) - mass >= top_p
        drop[:, 0] = False
        ordered = ordered.masked_fill(drop, -torch.inf)
    return torch.empty_like(z).scatter_(1, index, ordered)


def truncate_sharded(z: Tensor, top_k: int, top_p: float, shard: VocabShard) -> Tensor:
    """The same for this rank's valid columns. A collective over shard.group."""
    peak = gather_ranks(z.amax(-1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf), shard).amax(0)
    key = order_key(z)
    kept = torch.ones_like(z, dtype=torch.bool)
    if top_k:
        target = torch.full_like(peak, top_k, dtype=torch.float64)
        kept = _leading(key, kept, torch.ones_like(z, dtype=torch.float64), target, shard)
    if top_p < 1.0:
        weight = (z.double() - torch.where(peak == -torch.inf, 0.0, peak.double())[:, None]).exp()
        target = top_p * _sum_over_ranks(torch.where(kept, weight, 0.0).sum(-1), shard)
        kept = _leading(key, kept, weight, target, shard)
    return z.masked_fill(~kept, -torch.inf)


def order_key(z: Tensor) -> Tensor:
    """int64 in [0, 2^32) that orders as fp32(z) does."""
    bits = (z.float() + 0.0).view(torch.int32).long()  # + 0.0: both zeros are one value
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31)


def _leading(key: Tensor, kept: Tensor, weight: Tensor, target: Tensor, shard: VocabShard) -> Tensor:
    """Of the columns in `kept`, largest first and lowest id first among equals, those before which less than `target`
    of weight lies."""
    weight = torch.where(kept, weight, 0.0)

    def total(chosen: Tensor) -> Tensor:
        return _sum_over_ranks(torch.where(chosen, weight, 0.0).sum(-1), shard)

    last = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
    for bit in reversed(range(32)):
        raised = last | (1 << bit)
        last = torch.where(total(key >= raised[:, None]) >= target, raised, last)
    equal = kept & (key == last[:, None])
    share = torch.where(equal, weight, 0.0)
    above = torch.where(key > last[:, None], weight, 0.0).sum(-1)
    one = share.amax(-1) if share.shape[1] else torch.zeros_like(above)
    start = torch.full_like(above, shard.start)
    above_R, one_R, count_R, start_R = gather_ranks(
        torch.stack([above, one, equal.double().sum(-1), start]), shard
    ).unbind(1)
    before = torch.where(start_R < shard.start, count_R, 0.0).sum(0)
    rank = before[:, None] + equal.double().cumsum(-1) - 1
    fits = above_R.sum(0)[:, None] + rank * one_R.amax(0)[:, None] < target[:, None]
    return kept & ((key > last[:, None]) | (equal & fits))


def gather_ranks(x: Tensor, shard: VocabShard) -> Tensor:
    """[ranks, *x.shape] in rank order, the same bits on every rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, x.contiguous(), group=shard.group)
    return torch.stack(parts)


def _sum_over_ranks(x: Tensor, shard: VocabShard) -> Tensor:
    return gather_ranks(x, shard).sum(0)
