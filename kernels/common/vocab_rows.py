"""Rows of logits whose vocabulary is sharded over ranks: local statistics, their merge, log-prob and gradient.

Unlike log_softmax, a rank reduces its columns to four numbers per row. Only those travel; every rank merges them in
rank order, in fp32, to the same bits. With m the maximum of the row and d = (z - m) / temperature:

    S = sum exp(d)        T = sum exp(d) * d
    log p(label) = d[label] - log S
    entropy = log S - T / S

The temperature divides after the maximum is subtracted: a quotient of -1e4 would be rounded by up to 5e-4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import TokenLogprobs, VocabShard
from ..validate import IGNORED_LABEL, single_backward, wide_dtype

# Legend
#   A  actions of the packed stream       V  columns of this rank's slice, padding included
#   C  rows of a chunk, or all A rows     v  columns of this rank's slice that are vocabulary
#   z  logits, [C, v] fp32 or fp64
#   statistics, gradients by token: [C]

# exp() is exactly 0 below this in fp32 and fp64. Clamping -inf to it keeps 0 * -inf out of p * log p.
FLOOR = -1e4


class RowStats(NamedTuple):
    """Statistics of each row [C]; a row with NaN has a sum_exp of NaN, and one without any finite logit has 0."""

    max: Tensor  # of the logits, not divided by the temperature
    sum_exp: Tensor  # S
    label_logit: Tensor  # not divided by the temperature; -inf if no merged rank has the label
    sum_exp_shifted: Tensor  # T; 0 if the entropy is not wanted

    def logprob(self, temperature: float | Tensor) -> Tensor:
        """Return log p(label): NaN for a row with NaN."""
        return label_logprob(self.label_logit, self.max, self.sum_exp, temperature)

    def entropy(self) -> Tensor:
        """Return the entropy in nats: 0 for a row without any finite logit, NaN for a row with NaN."""
        return torch.where(self.sum_exp != 0, self.sum_exp.log() - self.sum_exp_shifted / self.sum_exp, 0.0)

    def select(self, rows: Tensor | slice) -> RowStats:
        """Return the statistics of some rows."""
        return RowStats(*(x[rows] for x in self))


class TokenGrads(NamedTuple):
    """Gradient of each row by its log-prob and by its entropy [C]; entropy is None without an entropy term."""

    logprob: Tensor
    entropy: Tensor | None

    def select(self, rows: Tensor | slice) -> TokenGrads:
        """Return the gradients of some rows."""
        return TokenGrads(self.logprob[rows], None if self.entropy is None else self.entropy[rows])

    def by_logits(self, temperature: float) -> TokenGrads:
        """Return the gradients by z = logits / temperature, carried to the logits."""
        return TokenGrads(self.logprob / temperature, None if self.entropy is None else self.entropy / temperature)


class LocalRows(NamedTuple):
    """This rank's columns of each row: statistics, d = (z - max) / temperature (floored) and exp(d), [C, v] each."""

    stats: RowStats
    shifted: Tensor
    weights: Tensor


def label_logprob(label_logit: Tensor, row_max: Tensor, sum_exp: Tensor, temperature: float | Tensor) -> Tensor:
    """Return (label_logit - row_max) / temperature - log sum_exp; the temperature may be that of each row [C]."""
    # Subtract the maximum first: divided, or added to log S, a maximum of -1e4 would cost four digits.
    inner = scale_shifted(label_logit - finite_or_zero(row_max), temperature) - sum_exp.log()
    # A label at -inf has log-prob -inf, also in a row without any finite logit, where -inf + inf would be NaN.
    return torch.where((label_logit == -torch.inf) & ~sum_exp.isnan(), label_logit, inner)


def scale_shifted(shifted: Tensor, temperature: float | Tensor) -> Tensor:
    """Return differences of logits over the temperature."""
    return shifted if not isinstance(temperature, Tensor) and temperature == 1.0 else shifted / temperature


def finite_or_zero(row_max: Tensor) -> Tensor:
    """Return the maxima with 0 for -inf: subtracting -inf from -inf would make NaN."""
    return torch.where(row_max == -torch.inf, 0.0, row_max)


def empty_row_stats(z: Tensor) -> RowStats:
    """Return the statistics of rows without columns: neutral in `merge_row_stats`."""
    zero = z.new_zeros(z.shape[0])
    lowest = torch.full_like(zero, -torch.inf)
    return RowStats(lowest, zero, lowest, zero)


def locate_label(labels: Tensor, shard: VocabShard | None, columns: int) -> tuple[Tensor, Tensor]:
    """Return the column of each label in this slice, clamped, and whether the slice has the label."""
    column = labels.long() - (0 if shard is None else shard.start)
    in_shard = (column >= 0) & (column < columns)
    return column.clamp(0, max(columns - 1, 0)), in_shard


def local_rows(
    z: Tensor, labels: Tensor, shard: VocabShard | None, temperature: float | Tensor, entropy: bool
) -> LocalRows:
    """Return statistics and exponentials of this rank's columns z [C, v]; `temperature` may be one by row [C]."""
    if z.shape[1] == 0:
        return LocalRows(empty_row_stats(z), z, z)
    row_max = z.amax(-1)
    column, in_shard = locate_label(labels, shard, z.shape[1])
    label_logit = torch.where(in_shard, z.gather(1, column[:, None]).squeeze(1), -torch.inf)
    shifted = z - finite_or_zero(row_max)[:, None]
    if isinstance(temperature, Tensor):
        shifted.div_(temperature[:, None])
    elif temperature != 1.0:
        shifted.div_(temperature)
    shifted.clamp_(min=FLOOR)
    weights = shifted.exp()
    sum_exp_shifted = (weights * shifted).sum(-1) if entropy else torch.zeros_like(row_max)
    return LocalRows(RowStats(row_max, weights.sum(-1), label_logit, sum_exp_shifted), shifted, weights)


def merge_row_stats(local: RowStats, shard: VocabShard | None, temperature: float) -> RowStats:
    """Return the statistics of the full rows. A collective over shard.group; every rank merges in rank order."""
    if shard is None or shard.group is None:
        return local
    # 1. All-gather four numbers per row.
    packed = torch.stack(local)
    parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, packed, group=shard.group)
    # 2. Rescale the sums of each rank to the global maximum, and add them in rank order.
    row_max = torch.stack([p[0] for p in parts]).amax(0)
    sum_exp, sum_exp_shifted = torch.zeros_like(row_max), torch.zeros_like(row_max)
    label_logit = torch.full_like(row_max, -torch.inf)
    for part in (RowStats(*p.unbind()) for p in parts):
        shift = scale_shifted(finite_or_zero(part.max) - finite_or_zero(row_max), temperature).clamp(min=FLOOR)
        # A rank without a finite logit has S = 0 and adds nothing, whatever its shift is.
        scale = torch.where(part.sum_exp != 0, shift.exp(), 0.0)
        sum_exp = sum_exp + part.sum_exp * scale
        sum_exp_shifted = sum_exp_shifted + (part.sum_exp_shifted + shift * part.sum_exp) * scale
        label_logit = torch.maximum(label_logit, part.label_logit)
    return RowStats(row_max, sum_exp, label_logit, sum_exp_shifted)


def logit_gradient(
    local: LocalRows,
    merged: RowStats,
    labels: Tensor,
    shard: VocabShard | None,
    temperature: float,
    grads: TokenGrads,
) -> Tensor:
    """Return d loss / d z of this rank's columns, written over local.weights (and, with entropy, local.shifted).

    With g and h the gradients by log-prob and by entropy, each over the temperature, and H the entropy:

        dz = g (onehot - p) - h p (log p + H)
    """
    stats, shifted, weights = local
    if weights.shape[1] == 0:
        return weights
    grads = grads.by_logits(temperature)
    # p = weights * scale: from this rank's maximum and sum to those of the full row.
    shift = scale_shifted(finite_or_zero(stats.max) - finite_or_zero(merged.max), temperature)
    scale = torch.where(merged.sum_exp != 0, shift.exp() / merged.sum_exp, 0.0)
    if grads.entropy is None:
        dz = weights.mul_((-grads.logprob * scale)[:, None])
    else:
        # log p + H = shifted + offset
        offset = torch.where(merged.sum_exp != 0, shift - merged.sum_exp.log() + merged.entropy(), 0.0)
        inner = shifted.add_(offset[:, None]).mul_(grads.entropy[:, None]).add_(grads.logprob[:, None])
        dz = weights.mul_(-scale[:, None]).mul_(inner)
    column, in_shard = locate_label(labels, shard, weights.shape[1])
    return dz.scatter_add_(1, column[:, None], torch.where(in_shard, grads.logprob, 0.0)[:, None])


class _ShardedTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_AV: Tensor, labels_A: Tensor, temperature: float, entropy: bool, shard: VocabShard
    ) -> tuple[Tensor, Tensor | None]:
        z = _wide_logits(logits_AV, labels_A, shard)
        merged = merge_row_stats(local_rows(z, labels_A, shard, temperature, entropy).stats, shard, temperature)
        # Backward computes z again: saved, its exponentials would double the memory of the logits.
        ctx.save_for_backward(logits_AV, labels_A, *merged)
        ctx.options = (temperature, entropy, shard)
        ignored_A = labels_A == IGNORED_LABEL
        entropy_A = merged.entropy().masked_fill(ignored_A, 0.0) if entropy else None
        return merged.logprob(temperature).masked_fill(ignored_A, 0.0), entropy_A

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward("token_logprobs")
        grad_logprob_A, grad_entropy_A = upstream
        logits_AV, labels_A, *merged = ctx.saved_tensors
        temperature, entropy, shard = ctx.options
        z = _wide_logits(logits_AV, labels_A, shard)
        local = local_rows(z, labels_A, shard, temperature, False)
        ignored_A = labels_A == IGNORED_LABEL
        grads = TokenGrads(
            grad_logprob_A.masked_fill(ignored_A, 0.0), grad_entropy_A.masked_fill(ignored_A, 0.0) if entropy else None
        )
        dz = logit_gradient(local, RowStats(*merged), labels_A, shard, temperature, grads)
        # Padding columns keep a gradient of 0.
        grad_AV = torch.zeros_like(logits_AV)
        grad_AV[:, : dz.shape[1]] = dz.to(logits_AV.dtype)
        return grad_AV, None, None, None, None


def _wide_logits(logits_AV: Tensor, labels_A: Tensor, shard: VocabShard) -> Tensor:
    # Ignored rows become 0 before the exponential, so that NaN in them reaches neither statistics nor gradient.
    return logits_AV[:, : shard.valid].to(wide_dtype(logits_AV)).masked_fill((labels_A == IGNORED_LABEL)[:, None], 0.0)


def token_logprobs(
    logits_AV: Tensor, labels_A: Tensor, temperature: float, entropy: bool, shard: VocabShard
) -> TokenLogprobs:
    """Return log-probs (and entropies) of labels_A, the same bits on every rank of shard.group."""
    return TokenLogprobs(*_ShardedTokenLogprobs.apply(logits_AV, labels_A, temperature, entropy, shard))
