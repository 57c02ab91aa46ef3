"""Log-probs and policy loss straight from hidden states: the logit matrix [A, V] never exists.

Rows go through the head in chunks of chunk_rows. Scoring and update share `_head_rows` on the same rows with the same
chunk_rows, so that at equal weights their log-probs agree to the bit and the ratio is exactly 1. The loss forms its
gradient while a chunk's logits are at hand (three matrix products in all); its backward only scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .checks import IGNORED_LABEL, wide_dtype
from .reference_rows import Rows, local_rows, logit_gradient, merge_rows
from .types import PPOLoss, TokenLogprobs, VocabShard

CHUNK_LOGITS = 1 << 26  # at most 256 MiB of fp32 logits at a time
CHUNK_ROWS_MAX = 1024


def default_chunk_rows(vocab_size: int) -> int:
    """Rows per chunk, from the vocabulary extent alone: a power of two, so that equal calls chunk equally."""
    return min(CHUNK_ROWS_MAX, 1 << max(4, (CHUNK_LOGITS // vocab_size).bit_length() - 1))


@dataclass(frozen=True)
class _Head:
    """What a chunk needs beside its rows."""

    hidden_AH: Tensor
    weight_VH: Tensor  # valid columns only, in the dtype that the product reads
    labels_A: Tensor
    index_R: Tensor | None  # rows that count, or None for all
    temperature: float
    entropy: bool
    shard: VocabShard | None
    chunk_rows: int

    @property
    def rows(self) -> int:
        return self.labels_A.shape[0] if self.index_R is None else self.index_R.shape[0]

    def chunks(self) -> Iterator[Tensor | slice]:
        """Row selectors of the chunks, in order."""
        for start in range(0, self.rows, self.chunk_rows):
            stop = min(start + self.chunk_rows, self.rows)
            yield slice(start, stop) if self.index_R is None else self.index_R[start:stop]


def _prepare(hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows) -> _Head:
    valid = weight_VH.shape[0] if shard is None else shard.valid
    weight = weight_VH.detach()[:valid]
    if not _mixed_product(hidden_AH, weight):
        weight = weight.to(wide_dtype(hidden_AH, weight_VH))
    index_R = None if mask_A is None else ((mask_A != 0) & (labels_A != IGNORED_LABEL)).nonzero().squeeze(1)
    chunk_rows = chunk_rows or default_chunk_rows(weight_VH.shape[0])
    return _Head(hidden_AH.detach(), weight, labels_A, index_R, temperature, entropy, shard, chunk_rows)


def _mixed_product(hidden: Tensor, weight: Tensor) -> bool:
    """Low-precision operands with an fp32 result: one kernel on CUDA; elsewhere operands are widened first."""
    return hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _head_rows(head: _Head, select) -> tuple[Rows, Rows, Tensor, Tensor, Tensor, Tensor]:
    """The one forward: merged rows, local rows, z - peak, exp(z - peak), hidden rows and labels of a chunk."""
    hidden = head.hidden_AH[select].to(head.weight_VH.dtype)
    labels = head.labels_A[select]
    if head.index_R is None:
        ignored = labels == IGNORED_LABEL
        if ignored.device.type != "cpu" or ignored.any():
            # An ignored row may hold NaN, and 0 * NaN would reach dW through the product.
            hidden = hidden.masked_fill(ignored[:, None], 0.0)
    z = _matmul(hidden, head.weight_VH.t())
    if head.temperature != 1.0:
        z.div_(head.temperature)
    local, shifted, weights = local_rows(z, labels, head.shard, head.entropy)
    return merge_rows(local, head.shard), local, shifted, weights, hidden, labels


def _score(head: _Head) -> tuple[Tensor, Tensor | None]:
    logprob_A, entropy_A = _outputs(head)
    for select in head.chunks():
        rows, *_, labels = _head_rows(head, select)
        _store(head, select, rows, labels, logprob_A, entropy_A)
    return logprob_A, entropy_A


def _outputs(head: _Head) -> tuple[Tensor, Tensor | None]:
    dtype = wide_dtype(head.hidden_AH, head.weight_VH)
    logprob_A = torch.zeros(head.labels_A.shape[0], dtype=dtype, device=head.hidden_AH.device)
    return logprob_A, torch.zeros_like(logprob_A) if head.entropy else None


def _store(head, select, rows, labels, logprob_A, entropy_A) -> None:
    ignored = labels == IGNORED_LABEL
    logprob_A[select] = rows.logprob().masked_fill(ignored, 0.0)
    if entropy_A is not None:
        entropy_A[select] = rows.entropy().masked_fill(ignored, 0.0)


class _Gradients:
    """Accumulates dX per chunk and dW in fp32 (fp64 for fp64 inputs) over the chunks."""

    def __init__(self, head: _Head, weight_VH: Tensor, hidden: bool, weight: bool, into: Tensor | None = None) -> None:
        self.head = head
        self.hidden_AH = torch.zeros_like(head.hidden_AH) if hidden else None
        wide = wide_dtype(head.hidden_AH, head.weight_VH)
        self.weight_VH = (torch.zeros_like(weight_VH, dtype=wide) if into is None else into) if weight else None

    def add(self, select, dz: Tensor, hidden: Tensor) -> None:
        head = self.head
        if self.hidden_AH is not None:
            dx = _matmul(dz.to(head.weight_VH.dtype), head.weight_VH)
            if head.shard is not None and head.shard.group is not None:
                dist.all_reduce(dx, group=head.shard.group)
            self.hidden_AH[select] = dx.to(self.hidden_AH.dtype)
        if self.weight_VH is not None and dz.shape[1]:
            target = self.weight_VH[: dz.shape[1]]
            if hidden.dtype == target.dtype:
                target.addmm_(dz.t(), hidden)
            else:
                target.add_(_matmul(dz.to(hidden.dtype).t(), hidden))


def _chunk_gradient(head, select, parts, grad_logprob_A, grad_entropy_A) -> Tensor:
    rows, local, shifted, weights, _, labels = parts
    ignored = labels == IGNORED_LABEL
    g = grad_logprob_A.masked_fill(ignored, 0.0) / head.temperature
    h = None if grad_entropy_A is None else grad_entropy_A.masked_fill(ignored, 0.0) / head.temperature
    return logit_gradient(shifted, weights, local, rows, labels, head.shard, g, h)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows, into):
        head = _prepare(hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows)
        ctx.save_for_backward(hidden_AH, weight_VH, labels_A, mask_A)
        ctx.options = (temperature, entropy, shard, chunk_rows)
        ctx.into = into
        return _score(head)

    @staticmethod
    def backward(ctx, grad_logprob_A, grad_entropy_A):
        hidden_AH, weight_VH, labels_A, mask_A = ctx.saved_tensors
        head = _prepare(hidden_AH, weight_VH, labels_A, mask_A, *ctx.options)
        out = _Gradients(head, weight_VH, *ctx.needs_input_grad[:2], into=ctx.into)
        for select in head.chunks():
            parts = _head_rows(head, select)
            g_entropy = grad_entropy_A[select] if head.entropy else None
            dz = _chunk_gradient(head, select, parts, grad_logprob_A[select], g_entropy)
            out.add(select, dz, parts[4])
        return out.hidden_AH, _hand_over(out.weight_VH, weight_VH, ctx.into), *[None] * 7


def _hand_over(grad_VH: Tensor | None, weight_VH: Tensor, into: Tensor | None) -> Tensor | None:
    """dW for autograd, or None where it already lies in the caller's buffer."""
    if grad_VH is None:
        return None
    if into is not None:
        weight_VH.grad_added_to_main_grad = True
        return None
    return grad_VH.to(weight_VH.dtype)


def linear_logprobs(
    hidden_AH, weight_VH, labels_A, *, mask_A, temperature, entropy, shard, chunk_rows, weight_grad_out
) -> TokenLogprobs:
    if not torch.is_grad_enabled() or not (hidden_AH.requires_grad or weight_VH.requires_grad):
        head = _prepare(hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows)
        return TokenLogprobs(*_score(head))
    return TokenLogprobs(
        *_LinearLogprobs.apply(
            hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows, weight_grad_out
        )
    )


class _AttachGradient(torch.autograd.Function):
    """Gives a loss the gradients that were formed with it; backward scales them by the upstream scalar."""

    @staticmethod
    def forward(ctx, loss, hidden_AH, weight_VH, grad_AH, grad_VH, into):
        ctx.save_for_backward(grad_AH, grad_VH)
        ctx.weight_VH, ctx.into = weight_VH, into
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if upstream.dim() != 0:
            raise RuntimeError(
                f"linear_ppo_loss: expected a scalar upstream gradient, got shape {tuple(upstream.shape)}"
            )
        grad_AH, grad_VH = ctx.saved_tensors
        if grad_AH is not None:
            grad_AH = (grad_AH * upstream).to(grad_AH.dtype)
        if grad_VH is not None and ctx.into is not None:
            ctx.into.addcmul_(grad_VH, upstream.to(grad_VH.dtype))
        elif grad_VH is not None:
            grad_VH = grad_VH * upstream
        return None, grad_AH, _hand_over(grad_VH, ctx.weight_VH, ctx.into), None, None, None


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
    entropy = not (isinstance(terms["entropy_coef"], float | int) and terms["entropy_coef"] == 0)
    wants = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_AH, weight_VH)]
    with torch.no_grad():
        head = _prepare(hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows)
        white_A = advantage_A if moments is None else reference.whiten(advantage_A, moments, shift_mean=shift_mean)
        out = _Gradients(head, weight_VH, *wants)
        logprob_A, entropy_A = _outputs(head)
        for select in head.chunks():
            parts = _head_rows(head, select)
            _store(head, select, parts[0], parts[5], logprob_A, entropy_A)
            if any(wants):
                g, h = _token_gradient(
                    select, logprob_A, entropy_A, old_logprob_A, white_A, ref_logprob_A, weight_A, terms
                )
                g, h = g / normalizer, None if h is None else h / normalizer
                out.add(select, _chunk_gradient(head, select, parts, g, h), parts[4])
        counted_A = labels_A != IGNORED_LABEL if mask_A is None else (labels_A != IGNORED_LABEL) & (mask_A != 0)
        result = reference.ppo_policy_loss(
            logprob_A,
            old_logprob_A,
            white_A,
            entropy_A=entropy_A,
            ref_logprob_A=ref_logprob_A,
            mask_A=counted_A,
            weight_A=weight_A,
            normalizer=normalizer,
            **terms,
        )
    if not any(wants):
        return result
    loss = _AttachGradient.apply(result.loss, hidden_AH, weight_VH, out.hidden_AH, out.weight_VH, weight_grad_out)
    return PPOLoss(loss, result.stats)


def _token_gradient(select, logprob_A, entropy_A, old_A, advantage_A, ref_A, weight_A, terms):
    """d objective / d log-prob and / d entropy of a chunk's tokens, by autograd through the reference loss."""

    def rows(x_A):
        return None if x_A is None else x_A[select].to(logprob_A.dtype)

    with torch.enable_grad():
        inputs = [x_A[select].clone().requires_grad_() for x_A in (logprob_A, entropy_A) if x_A is not None]
        entropy = inputs[1] if entropy_A is not None else None
        loss_A, _ = reference.policy_token_loss(
            inputs[0], entropy, rows(old_A), rows(advantage_A), rows(ref_A), **terms
        )
        weight = torch.ones_like(loss_A) if weight_A is None else rows(weight_A)
        grads = torch.autograd.grad(loss_A, inputs, grad_outputs=weight)
    return grads[0], grads[1] if entropy is not None else None
