"""What happens to a chunk of logits [C, v] between the products, in PyTorch and in place: statistics and gradient.

Unlike common.vocab_rows, exp, sum and quotient are one pass of torch.softmax over the buffer. The largest probability
is then exp(0) / S, which yields the sum S, and the gradient is finished in the same memory. cpp.py has the same
functions for a CPU, triton.py for a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..common.vocab_rows import (
    FLOOR,
    RowStats,
    TokenGrads,
    empty_row_stats,
    finite_or_zero,
    locate_label,
    scale_shifted,
)
from ..ppo_policy_loss.inputs import PolicyObjective, PolicyStreams
from ..ppo_policy_loss.reference import policy_terms, ppo_policy_loss
from ..whitening.reference import whiten
from .inputs import ChunkOps, LogitsChunk
from .products import ChunkedHead

# Legend
#   C  rows of a chunk                 L  rows of a chunk that have a gradient ("active")
#   v  rows of this rank's weight that are vocabulary
#   z  logits [C, v], then softmax over this rank's columns, then gradient, in one buffer

# Rows of a temporary that the entropy needs: a temporary of a full chunk would double the memory.
BLOCK_ROWS = 32


def row_stats(head: ChunkedHead, z: Tensor, labels: Tensor) -> RowStats:
    """Return local statistics of each row; leaves the row's softmax over this rank's columns in z."""
    return _local_stats(head, z, labels, head.entropy)


def _local_stats(head: ChunkedHead, z: Tensor, labels: Tensor, entropy: bool) -> RowStats:
    if z.shape[1] == 0:
        return empty_row_stats(z)
    # 1. What needs the logits themselves: maximum and label.
    row_max = z.amax(-1)
    column, in_shard = locate_label(labels, head.shard, z.shape[1])
    label_logit = torch.where(in_shard, z.gather(1, column[:, None]).squeeze(1), -torch.inf)
    # 2. Softmax in place; the maximum has the probability 1 / S. The temperature divides after the maximum is
    #    subtracted, and after the product: bf16 operands would be rounded again.
    if head.temperature != 1.0:
        z.sub_(finite_or_zero(row_max)[:, None]).div_(head.temperature)
    torch.softmax(z, -1, out=z)
    sum_exp = z.amax(-1).reciprocal_()
    # 3. Softmax of a row without any finite logit is NaN: all its probabilities are 0 instead.
    no_logit = row_max == -torch.inf
    if z.device.type != "cpu" or no_logit.any():
        z.masked_fill_(no_logit[:, None], 0.0)
        sum_exp = sum_exp.masked_fill(no_logit, 0.0)
    sum_exp_shifted = _sum_exp_shifted(z, sum_exp) if entropy else torch.zeros_like(row_max)
    return RowStats(row_max, sum_exp, label_logit, sum_exp_shifted)


def _sum_exp_shifted(p: Tensor, sum_exp: Tensor) -> Tensor:
    """Return sum of exp(z - max) * (z - max), from the softmax p of the row and its sum."""
    entropy = torch.cat([torch.special.entr(rows).sum(-1) for rows in p.split(BLOCK_ROWS)])
    return torch.where(sum_exp != 0, sum_exp * (sum_exp.log() - entropy), 0.0)


def recompute_stats(head: ChunkedHead, z: Tensor, labels: Tensor) -> RowStats:
    """Return local statistics without entropy, and leave in z what `logits_grad` expects."""
    return _local_stats(head, z, labels, False)


def logits_grad(
    head: ChunkedHead, chunk: LogitsChunk, grads: TokenGrads, active: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return (dz [L, v] of the active rows, a factor that each row still lacks or None), over chunk.logits.

    With g and h the gradients by log-prob and by entropy, each over the temperature, and H the entropy:

        dz = g (onehot - p) - h p (log p + H)
    """
    shard, dtype = head.shard, head.weight_VH.dtype
    z, labels, local, merged = chunk.logits, chunk.labels, chunk.local, chunk.merged
    grads = grads.by_logits(head.temperature)
    # 1. Drop rows without a gradient.
    if active is not None:
        z, labels, grads = _compact_rows(z, active), labels[active], grads.select(active)
        local, merged = None if local is None else local.select(active), merged.select(active)
    if z.shape[1] == 0:
        return z.to(dtype), None
    # 2. From probabilities over this rank's columns to those over the vocabulary.
    if local is not None and shard is not None and shard.group is not None:
        shift = scale_shifted(finite_or_zero(local.max) - finite_or_zero(merged.max), head.temperature).clamp(min=FLOOR)
        z.mul_(torch.where(merged.sum_exp != 0, shift.exp() * local.sum_exp / merged.sum_exp, 0.0)[:, None])
    column, in_shard = locate_label(labels, shard, z.shape[1])
    # 3. Without an entropy term dz = -g (p - onehot). The factor -g is left to the products, whose narrow side it
    #    scales, unless a cast passes over z anyway.
    if grads.entropy is None:
        z.scatter_add_(1, column[:, None], -in_shard.to(z.dtype)[:, None])
        if dtype == z.dtype:
            return z, -grads.logprob
        return z.mul_(-grads.logprob[:, None]).to(dtype), None
    # 4. With one, -p (g + h (log p + H)), then g onehot; log p by blocks of rows.
    columns = (z, grads.logprob, grads.entropy, merged.entropy())
    for p, g, h, entropy in zip(*(x.split(BLOCK_ROWS) for x in columns), strict=True):
        inner = p.log().clamp_(min=FLOOR).add_(entropy[:, None]).mul_(-h[:, None]).sub_(g[:, None])
        p.mul_(inner)
    z.scatter_add_(1, column[:, None], torch.where(in_shard, grads.logprob, 0.0)[:, None])
    return z.to(dtype), None


def _compact_rows(z: Tensor, active: Tensor) -> Tensor:
    """Return the active rows of z. On a CPU they move within z, row by row: a copy would double the memory."""
    if z.is_cuda:
        return z[active]
    # `active` names sources that are never overwritten before they are read: see chunked._active_rows.
    moved = (active != torch.arange(active.shape[0])).nonzero().squeeze(1)
    for target, source in zip(moved.tolist(), active[moved].tolist(), strict=True):
        z[target].copy_(z[source])
    return z[: active.shape[0]]


def token_grads(
    logprob: Tensor, entropy: Tensor | None, streams: PolicyStreams, objective: PolicyObjective
) -> TokenGrads:
    """Return d objective / d log-prob and d objective / d entropy of each token, by autograd through the reference."""
    if objective.moments is not None:
        advantage = whiten(streams.advantage_A, objective.moments, shift_mean=objective.shift_mean)
        streams = replace(streams, advantage_A=advantage)
    # The weight is the upstream gradient of each token's loss. Without one, counted rows have 1.
    weight = streams.mask_A if streams.weight_A is None else streams.weight_A
    assert weight is not None
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in (logprob, entropy) if x is not None]
        terms = policy_terms(inputs[0], None if entropy is None else inputs[1], streams, objective)
        grads = torch.autograd.grad(terms.loss, inputs, weight.to(logprob.dtype))
    return TokenGrads(grads[0], grads[1] if entropy is not None else None)


TORCH_OPS = ChunkOps(row_stats, recompute_stats, logits_grad, token_grads, ppo_policy_loss)
