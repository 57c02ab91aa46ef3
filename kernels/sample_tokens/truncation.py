"""top-k, top-p and min-p in plain PyTorch: by sorting on one rank, by a threshold search over a sharded vocabulary.

Both keep the top_k largest, then of those the smallest set of mass >= top_p; among equals the lowest ids stay. Masses
are fp64, so the two ways disagree only if a mass lies within 1e-15 of top_p. Over a sharded vocabulary no logit
travels: 32 rounds find the last value that is kept, bit by bit, with one number per row and rank in each, and one round
of four numbers settles its equals. top_k and top_p together take at most 68 small all-gathers, whatever the vocabulary.
min_p comes last and compares with the largest logit, which the others always keep, so it needs that logit alone.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import VocabShard
from .inputs import Distribution, column

# Legend
#   N  rows      R  ranks of the shard's group      v  columns of this rank's slice that are vocabulary
#   z  logits, [N, v]                               key  int64 [N, v] that orders as z does


def truncate(z: Tensor, distribution: Distribution) -> Tensor:
    """Return z [N, V] with -inf in the columns that are dropped."""
    if distribution.cuts_top_k or distribution.cuts_top_p:
        # A stable sort keeps equals in the order of their ids.
        ordered, index = torch.sort(z, dim=-1, descending=True, stable=True)
        z = torch.empty_like(z).scatter_(1, index, _truncate_ordered(ordered, distribution))
    return _drop_improbable(z, z.amax(-1), distribution)


def _truncate_ordered(ordered: Tensor, distribution: Distribution) -> Tensor:
    """Return rows that descend, with -inf where top_k or top_p drops a column."""
    if distribution.cuts_top_k:
        top_k = column(distribution.effective(distribution.top_k, 0))
        rank = torch.arange(ordered.shape[1], device=ordered.device)
        keep = (rank < top_k) | (top_k <= 0) if isinstance(top_k, Tensor) else rank < top_k
        ordered = torch.where(keep, ordered, -torch.inf)
    if distribution.cuts_top_p:
        # A column stays if the mass before it is below top_p; the largest always stays.
        top_p = column(distribution.effective(distribution.top_p, 1.0))
        mass = torch.softmax(ordered.double() / column(distribution.scale), dim=-1)
        drop = mass.cumsum(-1) - mass >= top_p
        if isinstance(top_p, Tensor):
            drop &= top_p < 1.0
        drop[:, 0] = False
        ordered = ordered.masked_fill(drop, -torch.inf)
    return ordered


def _drop_improbable(z: Tensor, row_max: Tensor, distribution: Distribution) -> Tensor:
    """Return z with -inf where the probability is below min_p times the largest: z < max + temperature * log min_p."""
    if not distribution.cuts_min_p:
        return z
    min_p = distribution.effective(distribution.min_p, 0.0)
    log_min_p = min_p.double().log() if isinstance(min_p, Tensor) else math.log(min_p)
    lowest = row_max.double() + distribution.scale * log_min_p
    return z.masked_fill(z.double() < lowest[:, None], -torch.inf)


def truncate_sharded(z: Tensor, distribution: Distribution, shard: VocabShard) -> Tensor:
    """Return `truncate` of this rank's valid columns. A collective over shard.group."""
    # 1. The global maximum, to which the masses are relative.
    row_max = gather_ranks(z.amax(-1) if z.shape[1] else z.new_full((z.shape[0],), -torch.inf), shard).amax(0)
    key = order_key(z)
    kept = torch.ones_like(z, dtype=torch.bool)
    # 2. top-k: the weight of a column is 1, and the target a count. No count reaches an infinite target.
    if distribution.cuts_top_k:
        top_k = distribution.effective(distribution.top_k, 0)
        target = torch.as_tensor(top_k, dtype=torch.float64, device=z.device).expand(z.shape[0])
        target = torch.where(target > 0, target, torch.inf)
        kept = _keep_leading(key, kept, torch.ones_like(z, dtype=torch.float64), target, shard)
    # 3. top-p over what top-k left: the weight is a probability mass.
    if distribution.cuts_top_p:
        top_p = torch.as_tensor(distribution.effective(distribution.top_p, 1.0), dtype=torch.float64, device=z.device)
        shifted = z.double() - torch.where(row_max == -torch.inf, 0.0, row_max.double())[:, None]
        weight = (shifted / column(distribution.scale)).exp()
        total = gather_ranks(torch.where(kept, weight, 0.0).sum(-1), shard).sum(0)
        target = torch.where(top_p < 1.0, top_p * total, torch.inf)
        kept = _keep_leading(key, kept, weight, target, shard)
    return _drop_improbable(z.masked_fill(~kept, -torch.inf), row_max, distribution)


def order_key(z: Tensor) -> Tensor:
    """Return int64 keys in [0, 2^32) that order as fp32(z) does."""
    # Adding 0.0 turns -0.0 into 0.0, whose bits must compare equal.
    bits = (z.float() + 0.0).view(torch.int32).long()
    # Negative floats order backwards by their bits: flip all but the sign.
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31)


def _keep_leading(key: Tensor, kept: Tensor, weight: Tensor, target: Tensor, shard: VocabShard) -> Tensor:
    """Return the columns of `kept` before which less than `target` of weight lies.

    The order is largest first, and lowest id first among equals.
    """
    weight = torch.where(kept, weight, 0.0)

    def total_weight(columns: Tensor) -> Tensor:
        return gather_ranks(torch.where(columns, weight, 0.0).sum(-1), shard).sum(0)

    # 1. The key of the last value that is kept: the largest above whose lower bound `target` of weight lies. Each of 32
    #    rounds settles one bit, from the highest.
    last_key = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
    for bit in reversed(range(32)):
        raised = last_key | (1 << bit)
        last_key = torch.where(total_weight(key >= raised[:, None]) >= target, raised, last_key)
    # 2. Columns with that key, and what a rank must know of them: weight above, weight of one, count, first column.
    equal = kept & (key == last_key[:, None])
    equal_weight = torch.where(equal, weight, 0.0)
    above = torch.where(key > last_key[:, None], weight, 0.0).sum(-1)
    one = equal_weight.amax(-1) if equal_weight.shape[1] else torch.zeros_like(above)
    start = torch.full_like(above, shard.start)
    above_R, one_R, count_R, start_R = gather_ranks(
        torch.stack([above, one, equal.double().sum(-1), start]), shard
    ).unbind(1)
    # 3. The rank of an equal among all equals, in the order of global ids, decides whether it fits.
    before = torch.where(start_R < shard.start, count_R, 0.0).sum(0)
    rank = before[:, None] + equal.double().cumsum(-1) - 1
    fits = above_R.sum(0)[:, None] + rank * one_R.amax(0)[:, None] < target[:, None]
    return kept & ((key > last_key[:, None]) | (equal & fits))


def gather_ranks(x: Tensor, shard: VocabShard) -> Tensor:
    """Return x of all ranks, [R, *x.shape] in rank order, the same bits on every rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, x.contiguous(), group=shard.group)
    return torch.stack(parts)
