"""Log-probs and policy loss straight from hidden states, chunk by chunk: the logit matrix [A, V] never exists.

Scoring and update walk the chunks with one routine (`_walk`) on the same rows with the same chunk_rows, so that at
equal weights their log-probs agree to the bit and the ratio is exactly 1. The loss forms its gradient while a chunk's
logits are at hand: three matrix products in all. Which rows enter the product of the logits follows from the mask
alone; rows without any gradient (clipped, zero advantage) leave before the two products of the backward.

`steps` is what happens to a chunk's logits between the products: the module torch_ops (PyTorch) or triton.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ..common.vocab_rows import RowStats, merge_rows
from ..ppo_policy_loss.reference import counts
from ..types import PPOLoss, TokenLogprobs
from ..validate import IGNORED_LABEL, single_backward
from . import torch_ops
from .products import ChunkedHead, Gradients


def _walk(head: ChunkedHead, steps: ModuleType) -> Iterator[tuple[slice, Tensor, Tensor, RowStats, RowStats]]:
    """(chunk, hidden rows, logits as `steps` leaves them, this rank's statistics, those of the whole rows)."""
    for chunk in head.chunks():
        hidden = head.hidden(chunk)
        z = head.logits(hidden)
        local = steps.statistics(z, head.labels_R[chunk], head.shard, head.entropy)
        yield chunk, hidden, z, local, merge_rows(local, head.shard)
    head.release()


def _outputs(head: ChunkedHead, rows: RowStats, chunk: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
    """Log-prob and entropy of rows, 0 at ignored labels."""
    ignored = head.labels_R[chunk] == IGNORED_LABEL
    return rows.logprob().masked_fill(ignored, 0.0), rows.entropy().masked_fill(ignored, 0.0) if head.entropy else None


def _score(head: ChunkedHead, steps: ModuleType) -> Tensor:
    """Statistics of all rows that count, [4, R]: the fields of `RowStats`."""
    found = [torch.stack([rows.peak, rows.total, rows.label, rows.weighted]) for *_, rows in _walk(head, steps)]
    return torch.cat(found, dim=1) if found else head.hidden_AH.new_zeros(4, 0, dtype=head.wide)


def _no_autocast(x: Tensor):
    # Autocast would run the products in bf16, logits included.
    return torch.autocast(x.device.type, enabled=False)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_AH, weight_VH, head, mask_A, into, steps):
        with _no_autocast(hidden_AH):
            packed = _score(head, steps)
        logprob_R, entropy_R = _outputs(head, RowStats(*packed))
        logprob_A, entropy_A = head.scatter_rows(logprob_R), None if entropy_R is None else head.scatter_rows(entropy_R)
        ctx.save_for_backward(hidden_AH, weight_VH, torch.stack([head.scatter_rows(x) for x in packed]))
        ctx.head, ctx.mask_A, ctx.into, ctx.steps = head, mask_A, into, steps
        return logprob_A, entropy_A

    @staticmethod
    def backward(ctx, grad_logprob_A, grad_entropy_A):
        single_backward("linear_logprobs")
        hidden_AH, weight_VH, packed = ctx.saved_tensors
        grads_A = [grad_logprob_A, *([grad_entropy_A] if ctx.head.entropy else [])]
        live_A = functools.reduce(torch.logical_or, [x != 0 for x in grads_A])
        # Rows without an upstream gradient are dropped before the logits are computed again.
        head = ctx.head.subset(live_A if ctx.mask_A is None else live_A & (ctx.mask_A != 0))
        packed_R = torch.stack([head.gather_rows(x) for x in packed])
        upstream_R = [head.gather_rows(x) / head.temperature for x in grads_A]
        out = Gradients(head, *ctx.needs_input_grad[:2], into=ctx.into)
        with _no_autocast(hidden_AH):
            for chunk in head.chunks():
                hidden, labels = head.hidden(chunk), head.labels_R[chunk]
                z = head.logits(hidden)
                local = ctx.steps.recompute_stats(z, labels, head.shard)
                g, h = (*(x[chunk] for x in upstream_R), None)[:2]
                rows = RowStats(*packed_R[:, chunk])
                out.add(chunk, None, *ctx.steps.gradient(z, labels, local, rows, None, head, g, h), hidden)
            grad_AH, grad_VH = out.finish()
        grad_AH = None if grad_AH is None else grad_AH.to(hidden_AH.dtype)
        return grad_AH, _deliver_weight_grad(grad_VH, weight_VH, ctx.into), None, None, None, None


def _deliver_weight_grad(grad_VH: Tensor | None, weight_VH: Tensor, into: Tensor | None) -> Tensor | None:
    """dW for autograd, or None where it already lies in the caller's buffer."""
    if grad_VH is None:
        return None
    if into is not None:
        weight_VH.grad_added_to_main_grad = True
        return None
    return grad_VH.to(weight_VH.dtype)


def linear_logprobs(
    hidden_AH,
    weight_VH,
    labels_A,
    *,
    mask_A,
    temperature,
    entropy,
    shard,
    chunk_rows,
    weight_grad_out,
    steps: ModuleType = torch_ops,
) -> TokenLogprobs:
    head = ChunkedHead.of(hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows)
    return TokenLogprobs(*_LinearLogprobs.apply(hidden_AH, weight_VH, head, mask_A, weight_grad_out, steps))


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
    steps: ModuleType = torch_ops,
    **terms,
) -> PPOLoss:
    entropy = counts(terms["entropy_coef"])
    head = ChunkedHead.of(hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows)
    kept_R = head.labels_R != IGNORED_LABEL
    streams = [
        None if x_A is None else torch.where(kept_R, head.gather_rows(x_A), 0.0)
        for x_A in (old_logprob_A, advantage_A, ref_logprob_A, weight_A)
    ]
    whitening = {"moments": moments, "shift_mean": shift_mean}
    wants = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden_AH, weight_VH))
    form = functools.partial(_loss_and_grads, head, steps, streams, kept_R, whitening, terms)
    with torch.no_grad(), _no_autocast(hidden_AH):
        logprob_R, entropy_R, gradients = form(wants)
        old_R, advantage_R, ref_R, weight_R = streams
        result = steps.policy_loss(
            logprob_R,
            old_R,
            advantage_R,
            entropy_A=entropy_R,
            ref_logprob_A=ref_R,
            mask_A=kept_R,
            weight_A=weight_R,
            normalizer=normalizer,
            **whitening,
            **terms,
        )
    if not any(wants):
        return result
    again = functools.partial(form, wants)
    loss = _AttachGradient.apply(result.loss, hidden_AH, weight_VH, gradients, again, normalizer, weight_grad_out)
    return PPOLoss(loss, result.stats)


def _loss_and_grads(head: ChunkedHead, steps: ModuleType, streams, kept_R, whitening, terms, wants):
    """(log-prob [R], entropy [R] or None, (dX, dW) of the sum of the objective: unscaled, wide, None if not wanted)."""
    logprobs, entropies = [], []
    out = Gradients(head, *wants)
    for chunk, hidden, z, local, rows in _walk(head, steps):
        logprob, entropy = _outputs(head, rows, chunk)
        logprobs.append(logprob)
        entropies.append(entropy)
        if not any(wants):
            continue
        parts = (None if x_R is None else x_R[chunk] for x_R in streams)
        g, h = steps.token_gradients(logprob, entropy, *parts, kept_R[chunk], **whitening, **terms)
        active = _active_rows(g, h)
        if active is None or active.numel():
            g, h = g / head.temperature, None if h is None else h / head.temperature
            dz, scale = steps.gradient(z, head.labels_R[chunk], local, rows, active, head, g, h)
            out.add(chunk, active, dz, scale, hidden)
    empty = head.hidden_AH.new_zeros(0, dtype=head.wide)
    logprob_R = torch.cat([empty, *logprobs])
    return logprob_R, torch.cat([empty, *entropies]) if head.entropy else None, out.finish()


def _active_rows(g: Tensor, h: Tensor | None) -> Tensor | None:
    """Rows with a gradient, or None where all have one. The last of them stand in the places of rows that leave.

    So row i of what is left was row i before, wherever it can be: closing up in order would move nearly every row.
    """
    keep = g != 0 if h is None else (g != 0) | (h != 0)
    active = keep.nonzero().squeeze(1)
    count = active.shape[0]
    if count == g.shape[0]:
        return None
    late = active[active >= count]
    active = torch.arange(count, device=g.device)
    return active.masked_scatter_(~keep[:count], late)


class _AttachGradient(torch.autograd.Function):
    """Gives a loss the gradients that were formed with it; backward scales them by upstream / normalizer, in place.

    The gradients are not scaled earlier: over a normalizer of a million tokens those in fp16 would vanish. They leave
    with the first backward, so that no second copy of dW exists; another backward (retain_graph) forms them again.
    """

    @staticmethod
    def forward(ctx, loss, hidden_AH, weight_VH, gradients, again, normalizer, into):
        ctx.save_for_backward(hidden_AH, weight_VH)
        ctx.gradients, ctx.again, ctx.normalizer, ctx.into = gradients, again, normalizer, into
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        single_backward("linear_ppo_loss")
        if upstream.dim() != 0:
            raise RuntimeError(
                f"linear_ppo_loss: expected a scalar upstream gradient, got shape {tuple(upstream.shape)}"
            )
        hidden_AH, weight_VH = ctx.saved_tensors
        if ctx.gradients is None:
            with _no_autocast(hidden_AH):
                *_, ctx.gradients = ctx.again()
        (grad_AH, grad_VH), ctx.gradients = ctx.gradients, None
        scale = upstream / ctx.normalizer
        if grad_AH is not None:
            grad_AH = _scaled(grad_AH, scale, hidden_AH.dtype)
        if grad_VH is not None and ctx.into is None:
            grad_VH = _scaled(grad_VH, scale, weight_VH.dtype)
        elif grad_VH is not None:
            ctx.into.addcmul_(grad_VH, scale.to(grad_VH.dtype))
        return None, grad_AH, _deliver_weight_grad(grad_VH, weight_VH, ctx.into), None, None, None, None


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale in dtype; may write over grad."""
    if grad.is_cuda and grad.dtype != dtype:  # one pass for product and rounding, which a CPU would need a copy for
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
    return grad.mul_(scale).to(dtype)
