"""What happens to a chunk of logits [C, v] between the products, in PyTorch and in place: statistics and gradient.

Departing from common.vocab_rows: exp, sum and quotient are one pass of torch.softmax over the buffer, after which the
largest probability tells the sum (exp(0) / sum), and the gradient is finished in the same memory. triton.py.py has
the same functions for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.vocab_rows import FLOOR, RowStats, finite, local_label
from ..ppo_policy_loss.reference import policy_token_loss, ppo_policy_loss
from ..types import VocabShard
from ..whitening.reference import whiten
from .products import ChunkedHead

BLOCK_ROWS = 32  # rows of a temporary where the entropy needs one: a chunk-sized one would double the memory


def statistics(z: Tensor, labels: Tensor, shard: VocabShard | None, entropy: bool) -> RowStats:
    """Local statistics of each row; leaves the row's softmax over this rank's columns in z."""
    if z.shape[1] == 0:
        empty = z.new_zeros(z.shape[0])
        nothing = torch.full_like(empty, -torch.inf)
        return RowStats(nothing, empty, nothing, empty)
    peak = z.amax(-1)
    column, here = local_label(labels, shard, z.shape[1])
    label = torch.where(here, z.gather(1, column[:, None]).squeeze(1), -torch.inf)
    torch.softmax(z, -1, out=z)
    total = z.amax(-1).reciprocal_()
    nothing = peak == -torch.inf
    if z.is_cuda or nothing.any():
        z.masked_fill_(nothing[:, None], 0.0)
        total = total.masked_fill(nothing, 0.0)
    return RowStats(peak, total, label, _weighted(z, total) if entropy else torch.zeros_like(peak))


def _weighted(p: Tensor, total: Tensor) -> Tensor:
    """Sum of exp(z - peak) * (z - peak), from the softmax p of the row and its sum."""
    entropy = torch.cat([torch.special.entr(rows).sum(-1) for rows in p.split(BLOCK_ROWS)])
    return torch.where(total > 0, total * (total.log() - entropy), 0.0)


def recompute_stats(z: Tensor, labels: Tensor, shard: VocabShard | None) -> RowStats:
    """What `gradient` expects where the rows' statistics are known already and z is new."""
    return statistics(z, labels, shard, False)


def gradient(
    z: Tensor,
    labels: Tensor,
    local: RowStats,
    rows: RowStats,
    active: Tensor | None,
    head: ChunkedHead,
    g: Tensor,
    h: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(dz [L, v] of the rows `active`, a factor that each row still lacks or None), over what `statistics` left in z.

    dz = g (onehot - p) - h p (log p + H), with g and h the gradients of log-prob and entropy by the logits.
    """
    shard, dtype = head.shard, head.weight_VH.dtype
    if active is not None:
        z, labels, g = _compact_rows(z, active), labels[active], g[active]
        h = None if h is None else h[active]
        local, rows = (RowStats(*(x[active] for x in (r.peak, r.total, r.label, r.weighted))) for r in (local, rows))
    if z.shape[1] == 0:
        return z.to(dtype), None
    if shard is not None and shard.group is not None:
        shift = (finite(local.peak) - finite(rows.peak)).clamp(min=FLOOR)
        z.mul_(torch.where(rows.total > 0, shift.exp() * local.total / rows.total, 0.0)[:, None])
    column, here = local_label(labels, shard, z.shape[1])
    if h is None:
        z.scatter_add_(1, column[:, None], -here.to(z.dtype)[:, None])
        if dtype == z.dtype:
            return z, -g
        return z.mul_(-g[:, None]).to(dtype), None
    for part, a, b, entropy in zip(*(x.split(BLOCK_ROWS) for x in (z, g, h, rows.entropy())), strict=True):
        inner = part.log().clamp_(min=FLOOR).add_(entropy[:, None]).mul_(-b[:, None]).sub_(a[:, None])
        part.mul_(inner)
    z.scatter_add_(1, column[:, None], torch.where(here, g, 0.0)[:, None])
    return z.to(dtype), None


def _compact_rows(z: Tensor, active: Tensor) -> Tensor:
    """The rows `active` of z. On a CPU they move within z, row by row: a copy would double the memory."""
    if z.is_cuda:
        return z[active]
    moved = (active != torch.arange(active.shape[0])).nonzero().squeeze(1)
    for target, row in zip(moved.tolist(), active[moved].tolist(), strict=True):
        z[target].copy_(z[row])
    return z[: active.shape[0]]


def token_gradients(
    logprob, entropy, old, advantage, ref, weight, kept, *, moments, shift_mean, **terms
) -> tuple[Tensor, Tensor | None]:
    """d objective / d log-prob and / d entropy of each token, by autograd through the reference."""
    if moments is not None:
        advantage = whiten(advantage, moments, shift_mean=shift_mean)
    weight = kept.to(logprob.dtype) if weight is None else weight
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in (logprob, entropy) if x is not None]
        loss, _ = policy_token_loss(inputs[0], None if entropy is None else inputs[1], old, advantage, ref, **terms)
        grads = torch.autograd.grad(loss, inputs, weight)
    return grads[0], grads[1] if entropy is not None else None


policy_loss = ppo_policy_loss
