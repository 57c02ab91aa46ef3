"""The linear operations in plain PyTorch: logits = hidden @ weight.T, then the plain operation.

Autograd does the rest, and the [A, V] logits exist. The chunked and the Triton forms are measured against this one, in
value, time and memory. chunk_rows has no effect here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ppo_policy_loss.inputs import PolicyObjective, PolicyStreams
from ..ppo_policy_loss.reference import ppo_policy_loss
from ..token_logprobs.reference import token_logprobs
from ..types import PPOLoss, TokenLogprobs
from ..validate import IGNORED_LABEL, wide_dtype
from .inputs import HeadInputs

# Legend: A, actions of the packed stream; H, width of the hidden states; V, rows of the weight, padding included.


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is all-reduced: each rank's slice of the vocabulary contributes to the same rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        grad = upstream[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _GradientInto(torch.autograd.Function):
    """Identity whose gradient is added to the caller's buffer and ends there."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, wide_VH: Tensor, buffer_VH: Tensor) -> Tensor:
        ctx.weight_VH, ctx.buffer_VH = weight_VH, buffer_VH
        return wide_VH.view_as(wide_VH)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        ctx.buffer_VH.add_(upstream[0])
        ctx.weight_VH.grad_added_to_main_grad = True
        return None, None, None


def _logits(head: HeadInputs, labels_A: Tensor) -> Tensor:
    wide = wide_dtype(head.hidden_AH, head.weight_VH)
    # An ignored row may hold NaN, and 0 * NaN would reach the weight's gradient through the product.
    hidden_AH = head.hidden_AH.masked_fill((labels_A == IGNORED_LABEL)[:, None], 0.0).to(wide)
    if head.shard is not None and head.shard.group is not None:
        hidden_AH = _SumGradient.apply(hidden_AH, head.shard.group)
    wide_VH = head.weight_VH.to(wide)
    if head.weight_grad_out is not None and head.weight_VH.requires_grad:
        wide_VH = _GradientInto.apply(head.weight_VH, wide_VH.detach(), head.weight_grad_out)
    # Autocast would run the product in bf16, logits included.
    with torch.autocast(hidden_AH.device.type, enabled=False):
        return hidden_AH @ wide_VH.t()


def linear_logprobs(head: HeadInputs, entropy: bool) -> TokenLogprobs:
    """Return log-probs and entropies; see the public function."""
    labels_A = head.labels_A
    if head.mask_A is not None:
        labels_A = torch.where(head.mask_A != 0, labels_A, IGNORED_LABEL)
    logits_AV = _logits(head, labels_A)
    return token_logprobs(logits_AV, labels_A, temperature=head.temperature, entropy=entropy, shard=head.shard)


def linear_ppo_loss(
    head: HeadInputs, streams: PolicyStreams, objective: PolicyObjective, normalizer: float | Tensor
) -> PPOLoss:
    """Return the loss and its statistics; see the public function."""
    counted_A = head.labels_A != IGNORED_LABEL
    if head.mask_A is not None:
        counted_A = counted_A & (head.mask_A != 0)
    scored = linear_logprobs(replace(head, mask_A=counted_A), objective.has_entropy)
    streams = replace(streams, mask_A=counted_A)
    return ppo_policy_loss(scored.logprob_A, scored.entropy_A, streams, objective, normalizer)
