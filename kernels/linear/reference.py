"""The plain PyTorch meaning of the linear operations: logits = hidden @ weight.T, then the plain operation.

Autograd does the rest, and the [A, V] logits exist: this is what the chunked and the Triton forms are measured
against, in value, time and memory. chunk_rows means nothing here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ppo_policy_loss.reference import counts, ppo_policy_loss
from ..token_logprobs.reference import token_logprobs
from ..types import PPOLoss, TokenLogprobs, VocabShard
from ..validate import IGNORED_LABEL, wide_dtype


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a group: every rank's slice of the vocabulary pulls at the same rows."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _GradientInto(torch.autograd.Function):
    """Identity whose gradient is added to the caller's buffer and ends there."""

    @staticmethod
    def forward(ctx, weight_VH, wide_VH, into):
        ctx.weight_VH, ctx.into = weight_VH, into
        return wide_VH.view_as(wide_VH)

    @staticmethod
    def backward(ctx, grad_VH):
        ctx.into.add_(grad_VH)
        ctx.weight_VH.grad_added_to_main_grad = True
        return None, None, None


def _logits(hidden_AH, weight_VH, labels_A, shard: VocabShard | None, weight_grad_out) -> Tensor:
    wide = wide_dtype(hidden_AH, weight_VH)
    # An ignored row may hold NaN, and 0 * NaN would reach the weight's gradient through the product.
    hidden_AH = hidden_AH.masked_fill((labels_A == IGNORED_LABEL)[:, None], 0.0).to(wide)
    if shard is not None and shard.group is not None:
        hidden_AH = _SumGradient.apply(hidden_AH, shard.group)
    wide_VH = weight_VH.to(wide)
    if weight_grad_out is not None and weight_VH.requires_grad:
        wide_VH = _GradientInto.apply(weight_VH, wide_VH.detach(), weight_grad_out)
    with torch.autocast(hidden_AH.device.type, enabled=False):
        return hidden_AH @ wide_VH.t()


def linear_logprobs(
    hidden_AH, weight_VH, labels_A, *, mask_A, temperature, entropy, shard, chunk_rows, weight_grad_out
) -> TokenLogprobs:
    if mask_A is not None:
        labels_A = torch.where(mask_A != 0, labels_A, IGNORED_LABEL)
    logits_AV = _logits(hidden_AH, weight_VH, labels_A, shard, weight_grad_out)
    return token_logprobs(logits_AV, labels_A, temperature=temperature, entropy=entropy, shard=shard)


def linear_ppo_loss(
    hidden_AH,
    weight_VH,
    labels_A,
    old_logprob_A,
    advantage_A,
    *,
    ref_logprob_A,
    mask_A,
    weight_A,
    normalizer,
    moments,
    shift_mean,
    temperature,
    shard,
    chunk_rows,
    weight_grad_out,
    **terms,
) -> PPOLoss:
    counted_A = labels_A != IGNORED_LABEL if mask_A is None else (labels_A != IGNORED_LABEL) & (mask_A != 0)
    scored = linear_logprobs(
        hidden_AH,
        weight_VH,
        labels_A,
        mask_A=counted_A,
        temperature=temperature,
        entropy=counts(terms["entropy_coef"]),
        shard=shard,
        chunk_rows=chunk_rows,
        weight_grad_out=weight_grad_out,
    )
    return ppo_policy_loss(
        scored.logprob_A,
        old_logprob_A,
        advantage_A,
        entropy_A=scored.entropy_A,
        ref_logprob_A=ref_logprob_A,
        mask_A=counted_A,
        weight_A=weight_A,
        normalizer=normalizer,
        moments=moments,
        shift_mean=shift_mean,
        **terms,
    )
