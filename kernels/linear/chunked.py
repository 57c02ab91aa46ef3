"""Log-probs and policy loss straight from hidden states, chunk by chunk: the logit matrix [A, V] never exists.

A chunk is `chunk_rows` consecutive rows of the R rows that the mask keeps. Its logits [C, V] exist in one buffer until
the next chunk.

Scoring and update iterate with one routine over the same rows in the same chunks. So at equal weights their log-probs
are bitwise identical, and the ratio is exactly 1.

The loss takes three matrix products: the logits, and the gradients by hidden states and by weight. It computes both
gradients in the forward pass, while the logits of the chunk exist. Rows without a gradient (clipped, zero advantage)
enter only the first product.

`ChunkOps` (TORCH_OPS, CPP_OPS or TRITON_OPS) holds the operations on the logits between the products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.vocab_rows import RowStats, TokenGrads, merge_row_stats
from ..ppo_policy_loss.inputs import PolicyObjective, PolicyStreams
from ..types import PPOLoss, TokenLogprobs
from ..validate import IGNORED_LABEL, single_backward
from .inputs import ChunkOps, HeadInputs, LogitsChunk
from .products import ChunkedHead, Gradients
from .torch_ops import TORCH_OPS

# Legend
#   A  actions of the packed stream        H  width of the hidden states
#   R  rows that the mask keeps            V  rows of the weight, padding included
#   C  rows of a chunk                     v  rows of the weight that are vocabulary
#   L  rows of a chunk with a gradient ("active")
#   dX [A, H], dW [V, H]: gradients by hidden states and weight, wide; None if not wanted

WeightGrads = tuple[Tensor | None, Tensor | None]  # (dX, dW)


def _iterate_chunks(head: ChunkedHead, ops: ChunkOps) -> Iterator[LogitsChunk]:
    """Yield the chunks, with logits and statistics, one at a time in one buffer."""
    for rows in head.chunks():
        hidden, labels = head.hidden(rows), head.labels_R[rows]
        z = head.logits(hidden)
        local = ops.row_stats(head, z, labels)
        yield LogitsChunk(rows, hidden, labels, z, local, merge_row_stats(local, head.shard, head.temperature))
    head.release()


def _logprob_and_entropy(head: ChunkedHead, stats: RowStats, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return log-prob and entropy of rows, 0 at ignored labels."""
    ignored = labels == IGNORED_LABEL
    logprob = stats.logprob(head.temperature).masked_fill(ignored, 0.0)
    return logprob, stats.entropy().masked_fill(ignored, 0.0) if head.entropy else None


def _score_rows(head: ChunkedHead, ops: ChunkOps) -> RowStats:
    """Return the statistics of all rows that count [R]."""
    packed = [torch.stack(chunk.merged) for chunk in _iterate_chunks(head, ops)]
    empty = head.hidden_AH.new_zeros(4, 0, dtype=head.wide)
    return RowStats(*(torch.cat(packed, dim=1) if packed else empty))


def _disable_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Autocast would run the products in bf16, logits included. The meta device has none.
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


@dataclass(frozen=True)
class _ScoringCall:
    """The arguments of linear_logprobs that are not tensors with a gradient, for its backward."""

    head: ChunkedHead
    mask_A: Tensor | None
    buffer_VH: Tensor | None
    ops: ChunkOps


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_AH: Tensor, weight_VH: Tensor, call: _ScoringCall) -> tuple[Tensor, Tensor | None]:
        head = call.head
        with _disable_autocast(hidden_AH):
            stats_R = _score_rows(head, call.ops)
        logprob_R, entropy_R = _logprob_and_entropy(head, stats_R, head.labels_R)
        # Four numbers per token are saved; backward computes the logits again.
        ctx.save_for_backward(hidden_AH, weight_VH, torch.stack([head.scatter_rows(x) for x in stats_R]))
        ctx.call = call
        return head.scatter_rows(logprob_R), None if entropy_R is None else head.scatter_rows(entropy_R)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward("linear_logprobs")
        hidden_AH, weight_VH, packed = ctx.saved_tensors
        call, ops = ctx.call, ctx.call.ops
        grad_logprob_A, grad_entropy_A = upstream
        # 1. Rows without an upstream gradient are dropped before the logits are computed again. Where the caller named
        #    the rows, the host does not wait to learn which these are: they add zeros.
        head = call.head
        if not head.rows_known:
            active_A = grad_logprob_A != 0
            if head.entropy:
                active_A = active_A | (grad_entropy_A != 0)
            head = head.subset(active_A if call.mask_A is None else active_A & (call.mask_A != 0))
        stats_R = RowStats(*(head.gather_rows(x) for x in packed))
        grad_entropy_R = head.gather_rows(grad_entropy_A) if head.entropy else None
        grads_R = TokenGrads(head.gather_rows(grad_logprob_A), grad_entropy_R)
        # 2. Three products per chunk: logits, dX and dW.
        out = Gradients(head, ctx.needs_input_grad[:2], call.buffer_VH)
        with _disable_autocast(hidden_AH):
            for rows in head.chunks():
                hidden, labels = head.hidden(rows), head.labels_R[rows]
                z = head.logits(hidden)
                local = ops.recompute_stats(head, z, labels)
                chunk = LogitsChunk(rows, hidden, labels, z, local, stats_R.select(rows))
                out.add(chunk, None, *ops.logits_grad(head, chunk, grads_R.select(rows), None))
            grad_AH, grad_VH = out.finish()
        # 3. In the dtype of the inputs, once, at the end.
        grad_AH = None if grad_AH is None else grad_AH.to(hidden_AH.dtype)
        return grad_AH, _deliver_weight_grad(grad_VH, weight_VH, call.buffer_VH), None


def _deliver_weight_grad(grad_VH: Tensor | None, weight_VH: Tensor, buffer_VH: Tensor | None) -> Tensor | None:
    """Return dW for autograd, or None if the caller's buffer has it already."""
    if grad_VH is None:
        return None
    if buffer_VH is not None:
        # Megatron's DDP reads this attribute of a parameter: it skips its own addition to main_grad.
        weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return None
    return grad_VH.to(weight_VH.dtype)


def linear_logprobs(head: HeadInputs, entropy: bool, ops: ChunkOps = TORCH_OPS) -> TokenLogprobs:
    """Return log-probs and entropies; see the public function."""
    call = _ScoringCall(ChunkedHead.of(head, entropy), head.mask_A, head.weight_grad_out, ops)
    return TokenLogprobs(*_LinearLogprobs.apply(head.hidden_AH, head.weight_VH, call))


def linear_ppo_loss(
    inputs: HeadInputs,
    streams: PolicyStreams,
    objective: PolicyObjective,
    normalizer: float | Tensor,
    ops: ChunkOps = TORCH_OPS,
) -> PPOLoss:
    """Return the loss and its statistics; see the public function."""
    hidden_AH, weight_VH = inputs.hidden_AH, inputs.weight_VH
    # 1. Streams of the rows that count, 0 where the label is ignored.
    head = ChunkedHead.of(inputs, objective.has_entropy)
    streams_R = _gather_streams(head, streams)
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden_AH, weight_VH))

    def forward_pass() -> tuple[Tensor, Tensor | None, WeightGrads]:
        with torch.no_grad(), _disable_autocast(hidden_AH):
            return _loss_and_grads(head, ops, streams_R, objective, (wanted[0], wanted[1]))

    # 2. Log-probs and gradients in one walk over the chunks, then loss and statistics over all rows at once.
    logprob_R, entropy_R, grads = forward_pass()
    with torch.no_grad():
        result = ops.policy_loss(logprob_R, entropy_R, streams_R, objective, normalizer)
    if not any(wanted):
        return result
    # 3. Attach the gradients.
    formed = _FormedGradients(grads, lambda: forward_pass()[2], normalizer, inputs.weight_grad_out)
    return PPOLoss(_AttachGradient.apply(result.loss, hidden_AH, weight_VH, formed), result.stats)


def _gather_streams(head: ChunkedHead, streams: PolicyStreams) -> PolicyStreams:
    """Return the streams at the rows that count; the mask is where the label counts."""
    keep_R = head.labels_R != IGNORED_LABEL

    def gathered(x_A: Tensor) -> Tensor:
        return torch.where(keep_R, head.gather_rows(x_A), 0.0)

    def gathered_optional(x_A: Tensor | None) -> Tensor | None:
        return None if x_A is None else gathered(x_A)

    return PolicyStreams(
        gathered_optional(streams.old_logprob_A),
        gathered(streams.advantage_A),
        gathered_optional(streams.ref_logprob_A),
        keep_R,
        gathered_optional(streams.weight_A),
    )


def _loss_and_grads(
    head: ChunkedHead, ops: ChunkOps, streams_R: PolicyStreams, objective: PolicyObjective, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, WeightGrads]:
    """Return log-prob [R], entropy [R] or None, and (dX, dW) of the sum of the objective, not yet normalized."""
    logprobs, entropies = [], []
    out = Gradients(head, wanted)
    for chunk in _iterate_chunks(head, ops):
        # 1. Log-probs of the chunk.
        logprob, entropy = _logprob_and_entropy(head, chunk.merged, chunk.labels)
        logprobs.append(logprob)
        entropies.append(entropy)
        if not any(wanted):
            continue
        # 2. Gradient of each token, then of its logits; rows whose gradient is 0 enter no further product.
        grads = ops.token_grads(logprob, entropy, streams_R.select(chunk.rows), objective)
        active = _active_rows(*grads) if head.drop_inactive else None
        if active is None or active.numel():
            dz, scale = ops.logits_grad(head, chunk, grads, active)
            # 3. The two products.
            out.add(chunk, active, dz, scale)
    empty = head.hidden_AH.new_zeros(0, dtype=head.wide)
    logprob_R = torch.cat([empty, *logprobs])
    entropy_R = torch.cat([empty, *(x for x in entropies if x is not None)]) if head.entropy else None
    return logprob_R, entropy_R, out.finish()


def _active_rows(grad_logprob: Tensor, grad_entropy: Tensor | None) -> Tensor | None:
    """Return the rows with a gradient, or None if all have one. The last of them fill the gaps before them.

    Row i of the result is row i wherever it has a gradient: closing up in order would move nearly every row.
    """
    keep = grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    active = keep.nonzero().squeeze(1)
    count = active.shape[0]
    if count == grad_logprob.shape[0]:
        return None
    if not count:
        return active
    # Gaps among the first `count` rows, and active rows after them, are equally many: gap g gets late row g. The host
    # has waited for `count`, and waits for no other number.
    gaps = ~keep[:count]
    late = count - gaps.sum() + gaps.cumsum(0) - 1
    return torch.where(gaps, active[late], torch.arange(count, device=grad_logprob.device))


@dataclass
class _FormedGradients:
    """Gradients that were formed with a loss: (dX, dW) of the unnormalized sum until a backward has taken them."""

    grads: WeightGrads | None
    form_again: Callable[[], WeightGrads]
    normalizer: float | Tensor
    buffer_VH: Tensor | None  # the caller's buffer for dW

    def take(self) -> WeightGrads:
        """Return the gradients and drop them here, so that no second copy of dW exists; form them again if gone."""
        grads, self.grads = self.grads, None
        return self.form_again() if grads is None else grads


class _AttachGradient(torch.autograd.Function):
    """Attach gradients, formed with a loss, to that loss; backward scales them by upstream / normalizer, in place.

    They are not scaled earlier: over a normalizer of a million tokens those in fp16 would vanish. A second backward
    (retain_graph) forms them again.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden_AH: Tensor, weight_VH: Tensor, formed: _FormedGradients) -> Tensor:
        ctx.save_for_backward(hidden_AH, weight_VH)
        ctx.formed = formed
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward("linear_ppo_loss")
        (grad_loss,) = upstream
        if grad_loss.dim() != 0:
            raise RuntimeError(
                f"linear_ppo_loss: expected a scalar upstream gradient, got shape {tuple(grad_loss.shape)}"
            )
        hidden_AH, weight_VH = ctx.saved_tensors
        grad_AH, grad_VH = ctx.formed.take()
        scale = grad_loss / ctx.formed.normalizer
        buffer_VH = ctx.formed.buffer_VH
        if grad_AH is not None:
            grad_AH = _scale_gradient(grad_AH, scale, hidden_AH.dtype)
        if grad_VH is not None and buffer_VH is None:
            grad_VH = _scale_gradient(grad_VH, scale, weight_VH.dtype)
        elif grad_VH is not None:
            # One pass: product and addition together.
            buffer_VH.addcmul_(grad_VH, scale.to(grad_VH.dtype))
        return None, grad_AH, _deliver_weight_grad(grad_VH, weight_VH, buffer_VH), None


def _scale_gradient(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * scale in dtype; may overwrite grad."""
    # On a GPU one pass multiplies and rounds. A CPU would need a copy for it.
    if grad.is_cuda and grad.dtype != dtype:
        return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
    return grad.mul_(scale).to(dtype)
