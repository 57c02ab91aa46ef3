"""token_logprobs in Triton: one pass over each row forward, one pass backward, never a softmax in memory.

The forward leaves four numbers per row (see reference_rows.Rows) and torch turns them into log-prob and entropy, so a
vocabulary shard merges exactly as the reference does. Row offsets are int64: rows times vocabulary passes 2^31 at
14,134 rows of Qwen's 151,936. The running maximum starts at -inf and is never subtracted while it is. A row whose
upstream gradient is zero is answered with zeros; its logits are not read. Nothing here may be autotuned: with
inplace_backward the backward kernel writes over its own input, and a second trial would read gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.vocab_rows import RowStats, finite, merge_rows
from ..dispatch import log_launch
from ..types import TokenLogprobs, VocabShard
from ..validate import IGNORED_LABEL, single_backward

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 4096
# Contraction into fma is asked for by name: Triton's default for it is not the same in every release.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def token_logprobs_forward(
    logits_ptr,
    labels_ptr,
    peak_ptr,
    total_ptr,
    label_ptr,
    weighted_ptr,
    row_stride,
    column_stride,
    start,
    valid,
    temperature,
    IGNORED: tl.constexpr,
    SCALED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == IGNORED:
        # log-prob 0 and entropy 0: every output is written, whatever the buffer held.
        tl.store(peak_ptr + row, 0.0)
        tl.store(total_ptr + row, 1.0)
        tl.store(label_ptr + row, 0.0)
        tl.store(weighted_ptr + row, 0.0)
    else:
        base = logits_ptr + row * row_stride
        peak = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        weighted = tl.full((), 0.0, tl.float32)
        for first in range(0, valid, BLOCK):
            column = first + tl.arange(0, BLOCK)
            z = tl.load(base + column.to(tl.int64) * column_stride, mask=column < valid, other=float("-inf"))
            z = z.to(tl.float32)
            if SCALED:
                z = tl.div_rn(z, temperature)
            new_peak = tl.maximum(peak, tl.max(z, axis=0))
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            shift = tl.where(peak == float("-inf"), 0.0, peak - safe)
            # Before the first finite logit total is 0, so the factor on it does not matter as long as it is finite.
            scale = tl.exp(shift)
            distance = z - safe
            weight = tl.exp(distance)
            if ENTROPY:
                weighted = (weighted + shift * total) * scale
                weighted += tl.sum(weight * tl.where(weight > 0.0, distance, 0.0), axis=0)
            # Said, not left to the compiler: with and without the entropy the sum must have the same bits.
            total = tl.fma(total, scale, tl.sum(weight, axis=0))
            peak = new_peak
        here = label - start
        inside = (here >= 0) & (here < valid)
        at_label = tl.load(base + here * column_stride, mask=inside, other=float("-inf")).to(tl.float32)
        if SCALED:
            at_label = tl.div_rn(at_label, temperature)
        tl.store(peak_ptr + row, peak)
        tl.store(total_ptr + row, total)
        tl.store(label_ptr + row, at_label)
        tl.store(weighted_ptr + row, weighted)


@triton.jit
def token_logprobs_backward(
    logits_ptr,
    labels_ptr,
    peak_ptr,
    log_total_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_ptr,
    live_ptr,
    row_stride,
    column_stride,
    grad_row_stride,
    grad_column_stride,
    columns,
    start,
    valid,
    temperature,
    IGNORED: tl.constexpr,
    SCALED: tl.constexpr,
    ENTROPY: tl.constexpr,
    COMPACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = grad_ptr + row * grad_row_stride + column.to(tl.int64) * grad_column_stride
    if COMPACT:  # the rows that have a gradient are written close together
        row = tl.load(live_ptr + row).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    g = tl.load(grad_logprob_ptr + row).to(tl.float32)
    h = tl.full((), 0.0, tl.float32)
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + row).to(tl.float32)
    if (label == IGNORED) | ((g == 0.0) & (h == 0.0)):
        tl.store(out, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), mask=column < columns)
    else:
        base = logits_ptr + row * row_stride
        z = tl.load(base + column.to(tl.int64) * column_stride, mask=column < valid, other=float("-inf"))
        z = z.to(tl.float32)
        if SCALED:
            z = tl.div_rn(z, temperature)
            g = tl.div_rn(g, temperature)
            h = tl.div_rn(h, temperature)
        logp = (z - tl.load(peak_ptr + row)) - tl.load(log_total_ptr + row)
        p = tl.exp(logp)
        inner = tl.zeros((BLOCK,), tl.float32) + g
        if ENTROPY:
            inner += h * (tl.where(p > 0.0, logp, 0.0) + tl.load(entropy_ptr + row))
        dz = tl.where(column + start == label, g, 0.0) - p * inner
        dz = tl.where(column < valid, dz, 0.0)
        tl.store(out, dz.to(grad_ptr.dtype.element_ty), mask=column < columns)


def _block(columns: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(columns)))


def statistics_launch(logits_CV, labels_C, start: int, valid: int, temperature: float, entropy: bool) -> RowStats:
    """Statistics of every row over its columns [0, valid), whose global ids begin at `start`."""
    rows_count = logits_CV.shape[0]
    buffer = torch.empty(4, rows_count, dtype=torch.float32, device=logits_CV.device)
    if rows_count:
        with torch.cuda.device_of(logits_CV):
            log_launch("token_logprobs_forward", "triton")
            token_logprobs_forward[(rows_count,)](
                logits_CV,
                labels_C.contiguous(),
                *buffer,
                *logits_CV.stride(),
                start,
                valid,
                temperature,
                IGNORED=IGNORED_LABEL,
                SCALED=temperature != 1.0,
                ENTROPY=entropy,
                BLOCK=_block(valid, FORWARD_BLOCK),
                **OPTIONS,
            )
    return RowStats(*buffer)


def gradient_launch(
    logits_CV: Tensor,
    labels_C: Tensor,
    rows: RowStats,
    entropy_C: Tensor | None,
    grad_logprob_C: Tensor,
    grad_entropy_C: Tensor | None,
    out: Tensor,
    live_L: Tensor | None,
    start: int,
    valid: int,
    temperature: float,
) -> None:
    """d loss / d logits into `out` [C, v], or [L, v] for the rows live_L alone; `out` may be logits_CV itself."""
    if not out.numel():
        return
    columns = out.shape[1]
    block = _block(columns, BACKWARD_BLOCK)
    grad_logprob_C = grad_logprob_C.contiguous()  # an expanded gradient has stride 0
    with torch.cuda.device_of(logits_CV):
        log_launch("token_logprobs_backward", "triton")
        token_logprobs_backward[(out.shape[0], triton.cdiv(columns, block))](
            logits_CV,
            labels_C.contiguous(),
            finite(rows.peak),
            rows.total.log(),
            grad_logprob_C if entropy_C is None else entropy_C,
            grad_logprob_C,
            grad_logprob_C if grad_entropy_C is None else grad_entropy_C.contiguous(),
            out,
            labels_C if live_L is None else live_L,
            *logits_CV.stride(),
            *out.stride(),
            columns,
            start,
            valid,
            temperature,
            IGNORED=IGNORED_LABEL,
            SCALED=temperature != 1.0,
            ENTROPY=grad_entropy_C is not None,
            COMPACT=live_L is not None,
            BLOCK=block,
            **OPTIONS,
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_AV, labels_A, temperature, entropy, shard, inplace):
        start, valid = (0, logits_AV.shape[1]) if shard is None else (shard.start, shard.valid)
        rows = merge_rows(statistics_launch(logits_AV, labels_A, start, valid, temperature, entropy), shard)
        ignored_A = labels_A == IGNORED_LABEL
        entropy_A = rows.entropy().masked_fill(ignored_A, 0.0) if entropy else None
        ctx.save_for_backward(logits_AV, labels_A, rows.peak, rows.total, rows.label, rows.weighted, entropy_A)
        ctx.options = (temperature, entropy, start, valid, inplace)
        return rows.logprob().masked_fill(ignored_A, 0.0), entropy_A

    @staticmethod
    def backward(ctx, grad_logprob_A, grad_entropy_A):
        single_backward("token_logprobs")
        logits_AV, labels_A, *merged, entropy_A = ctx.saved_tensors
        temperature, entropy, start, valid, inplace = ctx.options
        if inplace:
            # Whoever else saved these logits must hear of it: autograd compares versions, a kernel's write has none.
            torch.autograd.graph.increment_version(logits_AV)
            grad_AV = logits_AV.detach()
        else:
            grad_AV = torch.empty(logits_AV.shape, dtype=logits_AV.dtype, device=logits_AV.device)
        h = grad_entropy_A if entropy else None
        rows = RowStats(*merged)
        gradient_launch(
            logits_AV, labels_A, rows, entropy_A, grad_logprob_A, h, grad_AV, None, start, valid, temperature
        )
        return grad_AV, None, None, None, None, None


def token_logprobs(
    logits_AV: Tensor,
    labels_A: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    return TokenLogprobs(*_TokenLogprobs.apply(logits_AV, labels_A, temperature, entropy, shard, inplace_backward))
