"""A row of logits whose vocabulary is spread over ranks: local statistics, their merge, log-prob and gradient.

Departing from log_softmax: a rank reduces its columns to four numbers per row (maximum m, sum s of exp(z - m), label
logit, and t = sum of exp(z - m) * (z - m)), only those travel, and every rank merges them in rank order, in fp32, to
the same bits. With z = m + log-sum terms the entropy is log S - T / S relative to the global maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import TokenLogprobs, VocabShard
from ..validate import IGNORED_LABEL, single_backward, wide_dtype

# Below this exp() is exactly 0 in fp32 and fp64 alike; clamping -inf to it keeps 0 * -inf out of p * log p.
FLOOR = -1e4


@dataclass(frozen=True)
class RowStats:
    """Per-row statistics [C]: maximum, sum of exp(z - maximum), label logit (-inf where it is on no rank seen), t."""

    peak: Tensor
    total: Tensor
    label: Tensor
    weighted: Tensor

    def logprob(self) -> Tensor:
        # The peak leaves first: added to log total, a peak of -1e4 would cost it four digits. A label at -inf has
        # log-prob -inf, also in a row without any finite logit (where -inf + inf would be NaN).
        inner = (self.label - finite(self.peak)) - self.total.log()
        return torch.where(self.label == -torch.inf, self.label, inner)

    def entropy(self) -> Tensor:
        return torch.where(self.total > 0, self.total.log() - self.weighted / self.total, 0.0)


def finite(peak: Tensor) -> Tensor:
    return torch.where(peak == -torch.inf, 0.0, peak)


def local_label(labels: Tensor, shard: VocabShard | None, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each label in this slice, clamped, and whether it really lies here."""
    column = labels.long() - (0 if shard is None else shard.start)
    here = (column >= 0) & (column < columns)
    return column.clamp(0, max(columns - 1, 0)), here


def local_rows(z: Tensor, labels: Tensor, shard: VocabShard | None, entropy: bool) -> tuple[RowStats, Tensor, Tensor]:
    """Statistics of this rank's columns z [C, v]; also z - peak (floored) and its exponential, for the gradient."""
    if z.shape[1] == 0:
        empty = z.new_zeros(z.shape[0])
        nothing = torch.full_like(empty, -torch.inf)
        return RowStats(nothing, empty, nothing, empty), z, z
    peak = z.amax(-1)
    column, here = local_label(labels, shard, z.shape[1])
    label = torch.where(here, z.gather(1, column[:, None]).squeeze(1), -torch.inf)
    shifted = (z - finite(peak)[:, None]).clamp_(min=FLOOR)
    weights = shifted.exp()
    weighted = (weights * shifted).sum(-1) if entropy else torch.zeros_like(peak)
    return RowStats(peak, weights.sum(-1), label, weighted), shifted, weights


def merge_rows(mine: RowStats, shard: VocabShard | None) -> RowStats:
    """Statistics of the whole rows. A collective over shard.group; the merge order is the rank order on every rank."""
    if shard is None or shard.group is None:
        return mine
    packed = torch.stack([mine.peak, mine.total, mine.label, mine.weighted])
    parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, packed, group=shard.group)
    peak = torch.stack([p[0] for p in parts]).amax(0)
    total, weighted = torch.zeros_like(peak), torch.zeros_like(peak)
    label = torch.full_like(peak, -torch.inf)
    for part_peak, part_total, part_label, part_weighted in (p.unbind() for p in parts):
        shift = (finite(part_peak) - finite(peak)).clamp(min=FLOOR)
        # A rank without a finite logit has total 0, so whatever its shift is, it adds nothing.
        scale = torch.where(part_total > 0, shift.exp(), 0.0)
        total = total + part_total * scale
        weighted = weighted + (part_weighted + shift * part_total) * scale
        label = torch.maximum(label, part_label)
    return RowStats(peak, total, label, weighted)


def logit_gradient(
    shifted: Tensor,
    weights: Tensor,
    local: RowStats,
    rows: RowStats,
    labels: Tensor,
    shard: VocabShard | None,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """d loss / d z of this rank's columns, written over `weights` (and `shifted` where there is an entropy term).

    dz = g (onehot - p) - h p (log p + H), with g and h the gradients of log-prob and entropy.
    """
    if weights.shape[1] == 0:
        return weights
    shift = finite(local.peak) - finite(rows.peak)
    scale = torch.where(rows.total > 0, shift.exp() / rows.total, 0.0)
    if grad_entropy is None:
        dz = weights.mul_((-grad_logprob * scale)[:, None])
    else:
        offset = torch.where(rows.total > 0, shift - rows.total.log() + rows.entropy(), 0.0)
        inner = shifted.add_(offset[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprob[:, None])
        dz = weights.mul_(-scale[:, None]).mul_(inner)
    column, here = local_label(labels, shard, weights.shape[1])
    return dz.scatter_add_(1, column[:, None], torch.where(here, grad_logprob, 0.0)[:, None])


class _ShardedTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_AV, labels_A, temperature, entropy, shard):
        z = _scaled(logits_AV, labels_A, temperature, shard)
        local, _, _ = local_rows(z, labels_A, shard, entropy)
        rows = merge_rows(local, shard)
        ctx.save_for_backward(logits_AV, labels_A, rows.peak, rows.total, rows.label, rows.weighted)
        ctx.options = (temperature, entropy, shard)
        ignored_A = labels_A == IGNORED_LABEL
        entropy_A = rows.entropy().masked_fill(ignored_A, 0.0) if entropy else None
        return rows.logprob().masked_fill(ignored_A, 0.0), entropy_A

    @staticmethod
    def backward(ctx, grad_logprob_A, grad_entropy_A):
        single_backward("token_logprobs")
        logits_AV, labels_A, *merged = ctx.saved_tensors
        temperature, entropy, shard = ctx.options
        z = _scaled(logits_AV, labels_A, temperature, shard)
        local, shifted, weights = local_rows(z, labels_A, shard, False)
        ignored_A = labels_A == IGNORED_LABEL
        g = grad_logprob_A.masked_fill(ignored_A, 0.0) / temperature
        h = grad_entropy_A.masked_fill(ignored_A, 0.0) / temperature if entropy else None
        dz = logit_gradient(shifted, weights, local, RowStats(*merged), labels_A, shard, g, h)
        grad_AV = torch.zeros_like(logits_AV)
        grad_AV[:, : dz.shape[1]] = dz.to(logits_AV.dtype)
        return grad_AV, None, None, None, None


def _scaled(logits_AV: Tensor, labels_A: Tensor, temperature: float, shard: VocabShard) -> Tensor:
    z = logits_AV[:, : shard.valid].to(wide_dtype(logits_AV)) / temperature
    return z.masked_fill_((labels_A == IGNORED_LABEL)[:, None], 0.0)


def token_logprobs(
    logits_AV: Tensor, labels_A: Tensor, temperature: float, entropy: bool, shard: VocabShard
) -> TokenLogprobs:
    """Log-probs (and entropies) of labels_A, the same bits on every rank of shard.group."""
    return TokenLogprobs(*_ShardedTokenLogprobs.apply(logits_AV, labels_A, temperature, entropy, shard))
