"""token_logprobs in Triton: one pass over each row forward, one pass backward, never a softmax in memory.

The forward writes four numbers per row (common.vocab_rows.RowStats). Torch turns them into log-prob and entropy, so a
vocabulary shard merges exactly as the reference does. The running maximum starts at -inf and is never subtracted while
it is -inf. A row whose upstream gradient is 0 gets a gradient of 0 and its logits are not read.

No kernel here may be autotuned: with inplace_backward the backward kernel overwrites its own input, and a second trial
would read gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator, tensor_bytes
from ..common.vocab_rows import RowStats, TokenGrads, finite_or_zero, merge_row_stats
from ..dispatch import log_launch
from ..types import TokenLogprobs, VocabShard
from ..validate import IGNORED_LABEL, single_backward

# Legend
#   A  actions of the packed stream            V  columns of this rank's slice, padding included
#   C  rows of a chunk, or all A rows          L  rows of a chunk that have a gradient ("active")
#   logits   [C, V], any strides               labels, statistics, gradients by token: [C]
#   columns  [start, start + valid) are the global ids of this rank's vocabulary; later columns are padding
#   z        logits, fp32

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 4096
# Contraction into fma is requested by name: Triton's default for it differs between releases.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def token_logprobs_forward(
    logits_ptr,
    labels_ptr,
    max_ptr,
    sum_exp_ptr,
    label_logit_ptr,
    sum_exp_shifted_ptr,
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
    """Write the statistics of one row."""
    # int64 offsets: rows times vocabulary exceeds 2^31 at 14,134 rows of Qwen's 151,936 columns.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == IGNORED:
        # Log-prob 0 and entropy 0. Every output is written: the buffer is not initialised.
        tl.store(max_ptr + row, 0.0)
        tl.store(sum_exp_ptr + row, 1.0)
        tl.store(label_logit_ptr + row, 0.0)
        tl.store(sum_exp_shifted_ptr + row, 0.0)
    else:
        base = logits_ptr + row * row_stride
        row_max = tl.full((), float("-inf"), tl.float32)
        sum_exp = tl.full((), 0.0, tl.float32)
        sum_exp_shifted = tl.full((), 0.0, tl.float32)
        # 1. Online softmax (Milakov and Gimelshein 2018): rescale the sums when the maximum rises.
        for first in range(0, valid, BLOCK):
            column = first + tl.arange(0, BLOCK)
            z = tl.load(base + column.to(tl.int64) * column_stride, mask=column < valid, other=float("-inf"))
            z = z.to(tl.float32)
            new_max = tl.maximum(row_max, tl.max(z, axis=0))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            shift = tl.where(row_max == float("-inf"), 0.0, row_max - safe_max)
            distance = z - safe_max
            if SCALED:
                # After the subtraction: the quotient of a logit of -1e4 would be rounded by up to 5e-4. div_rn is IEEE
                # division, as PyTorch's: the default division rounds differently.
                shift = tl.div_rn(shift, temperature)
                distance = tl.div_rn(distance, temperature)
            # Before the first finite logit sum_exp is 0, so any finite factor will do.
            scale = tl.exp(shift)
            weight = tl.exp(distance)
            if ENTROPY:
                # sum exp(z - m) (z - m) needs both factors moved to the new maximum.
                sum_exp_shifted = (sum_exp_shifted + shift * sum_exp) * scale
                sum_exp_shifted += tl.sum(weight * tl.where(weight > 0.0, distance, 0.0), axis=0)
            # fma is explicit: with and without the entropy the sum must have the same bits.
            sum_exp = tl.fma(sum_exp, scale, tl.sum(weight, axis=0))
            row_max = new_max
        # 2. The label's logit, -inf if another rank has it.
        label_column = label - start
        in_shard = (label_column >= 0) & (label_column < valid)
        label_logit = tl.load(base + label_column * column_stride, mask=in_shard, other=float("-inf")).to(tl.float32)
        tl.store(max_ptr + row, row_max)
        tl.store(sum_exp_ptr + row, sum_exp)
        tl.store(label_logit_ptr + row, label_logit)
        tl.store(sum_exp_shifted_ptr + row, sum_exp_shifted)


@triton.jit
def token_logprobs_backward(
    logits_ptr,
    labels_ptr,
    max_ptr,
    log_sum_exp_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_ptr,
    active_ptr,
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
    """Write BLOCK columns of one row of the gradient: dz = g (onehot - p) - h p (log p + H)."""
    # 1. Find the row. With COMPACT the grid counts active rows, and their gradients are written close together.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = grad_ptr + row * grad_row_stride + column.to(tl.int64) * grad_column_stride
    if COMPACT:
        row = tl.load(active_ptr + row).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    grad_logprob = tl.load(grad_logprob_ptr + row).to(tl.float32)
    grad_entropy = tl.full((), 0.0, tl.float32)
    if ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32)
    if (label == IGNORED) | ((grad_logprob == 0.0) & (grad_entropy == 0.0)):
        # 2. No gradient: write zeros without reading the logits, which may be NaN.
        tl.store(out, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), mask=column < columns)
    else:
        # 3. Recompute log p from the logits and the row's statistics.
        base = logits_ptr + row * row_stride
        z = tl.load(base + column.to(tl.int64) * column_stride, mask=column < valid, other=float("-inf"))
        distance = z.to(tl.float32) - tl.load(max_ptr + row)
        if SCALED:
            distance = tl.div_rn(distance, temperature)
            # Chain rule: d distance / d logits = 1 / temperature.
            grad_logprob = tl.div_rn(grad_logprob, temperature)
            grad_entropy = tl.div_rn(grad_entropy, temperature)
        logp = distance - tl.load(log_sum_exp_ptr + row)
        p = tl.exp(logp)
        # 4. inner = g + h (log p + H), with 0 for log p where p is 0.
        inner = tl.zeros((BLOCK,), tl.float32) + grad_logprob
        if ENTROPY:
            inner += grad_entropy * (tl.where(p > 0.0, logp, 0.0) + tl.load(entropy_ptr + row))
        dz = tl.where(column + start == label, grad_logprob, 0.0) - p * inner
        # 5. Padding columns get a gradient of 0.
        dz = tl.where(column < valid, dz, 0.0)
        tl.store(out, dz.to(grad_ptr.dtype.element_ty), mask=column < columns)


class Columns(NamedTuple):
    """Which columns are vocabulary: [0, valid), with global ids from `start`; and the temperature of their logits."""

    start: int
    valid: int
    temperature: float


class ScoredRows(NamedTuple):
    """Labels [C] of rows, statistics of the full rows, and their entropies [C] if there is an entropy gradient."""

    labels: Tensor
    stats: RowStats
    entropy: Tensor | None


def _block(columns: int, most: int) -> int:
    # Triton needs a power of two.
    return min(most, max(16, triton.next_power_of_2(columns)))


def statistics_launch(logits_CV: Tensor, labels_C: Tensor, columns: Columns, entropy: bool) -> RowStats:
    """Return the statistics of every row over its vocabulary columns."""
    rows = logits_CV.shape[0]
    buffer = torch.empty(4, rows, dtype=torch.float32, device=logits_CV.device)
    if rows:
        _forward_step(logits_CV, labels_C.contiguous(), buffer, *columns, entropy)
    return RowStats(*buffer)


def _forward_cost(
    logits_CV: Tensor, labels_C: Tensor, stats_4C: Tensor, start: int, valid: int, temperature: float, entropy: bool
) -> Cost:
    rows = logits_CV.shape[0]
    # Maximum, difference, exponential and sum of every column; the entropy takes a product and a sum more.
    flops = rows * valid * (4 + (temperature != 1.0) + 2 * entropy)
    read = rows * valid * logits_CV.element_size() + tensor_bytes(labels_C)
    return Cost(1, flops, read, tensor_bytes(stats_4C))


@device_operator(
    "token_logprobs_forward(Tensor logits, Tensor labels, Tensor(a!) stats, int start, int valid, float temperature, "
    "bool entropy)",
    _forward_cost,
)
def _forward_step(
    logits_CV: Tensor, labels_C: Tensor, stats_4C: Tensor, start: int, valid: int, temperature: float, entropy: bool
) -> None:
    with torch.cuda.device_of(logits_CV):
        log_launch("token_logprobs_forward", "triton")
        token_logprobs_forward[(logits_CV.shape[0],)](
            logits_CV,
            labels_C,
            *stats_4C,
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


def gradient_launch(
    logits_CV: Tensor, rows: ScoredRows, grads: TokenGrads, out: Tensor, active_L: Tensor | None, columns: Columns
) -> None:
    """Write d loss / d logits to `out`: [C, V], or [L, V] for the rows active_L. `out` may be logits_CV itself."""
    if not out.numel():
        return
    # An expanded gradient has stride 0, and the kernel reads densely.
    _backward_step(
        logits_CV,
        rows.labels.contiguous(),
        finite_or_zero(rows.stats.max),
        # A row without any finite logit has p = 0, not NaN.
        rows.stats.sum_exp.log().nan_to_num(nan=torch.nan, neginf=torch.inf, posinf=torch.inf),
        None if grads.entropy is None else rows.entropy,
        grads.logprob.contiguous(),
        None if grads.entropy is None else grads.entropy.contiguous(),
        active_L,
        out,
        *columns,
    )


def _backward_cost(
    logits_CV: Tensor,
    labels_C: Tensor,
    row_max_C: Tensor,
    log_sum_exp_C: Tensor,
    entropy_C: Tensor | None,
    grad_logprob_C: Tensor,
    grad_entropy_C: Tensor | None,
    active_L: Tensor | None,
    out: Tensor,
    start: int,
    valid: int,
    temperature: float,
) -> Cost:
    # Only the rows of `out` are read, and of those the vocabulary.
    rows = out.shape[0]
    # Two differences, exponential, product and label of every column; the entropy takes a sum and two products more.
    flops = rows * valid * (5 + (temperature != 1.0) + 3 * (grad_entropy_C is not None))
    streams = (labels_C, row_max_C, log_sum_exp_C, entropy_C, grad_logprob_C, grad_entropy_C)
    row_bytes = valid * logits_CV.element_size() + sum(x.element_size() for x in streams if x is not None)
    return Cost(1, flops, rows * row_bytes + tensor_bytes(active_L), tensor_bytes(out))


@device_operator(
    "token_logprobs_backward(Tensor logits, Tensor labels, Tensor row_max, Tensor log_sum_exp, Tensor? entropy, "
    "Tensor grad_logprob, Tensor? grad_entropy, Tensor? active, Tensor(a!) out, int start, int valid, "
    "float temperature)",
    _backward_cost,
)
def _backward_step(
    logits_CV: Tensor,
    labels_C: Tensor,
    row_max_C: Tensor,
    log_sum_exp_C: Tensor,
    entropy_C: Tensor | None,
    grad_logprob_C: Tensor,
    grad_entropy_C: Tensor | None,
    active_L: Tensor | None,
    out: Tensor,
    start: int,
    valid: int,
    temperature: float,
) -> None:
    block = _block(out.shape[1], BACKWARD_BLOCK)
    with torch.cuda.device_of(logits_CV):
        log_launch("token_logprobs_backward", "triton")
        # Absent inputs get some pointer in their place; the kernel reads none of them.
        token_logprobs_backward[(out.shape[0], triton.cdiv(out.shape[1], block))](
            logits_CV,
            labels_C,
            row_max_C,
            log_sum_exp_C,
            grad_logprob_C if entropy_C is None else entropy_C,
            grad_logprob_C,
            grad_logprob_C if grad_entropy_C is None else grad_entropy_C,
            out,
            labels_C if active_L is None else active_L,
            *logits_CV.stride(),
            *out.stride(),
            out.shape[1],
            start,
            valid,
            temperature,
            IGNORED=IGNORED_LABEL,
            SCALED=temperature != 1.0,
            ENTROPY=grad_entropy_C is not None,
            COMPACT=active_L is not None,
            BLOCK=block,
            **OPTIONS,
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_AV: Tensor,
        labels_A: Tensor,
        temperature: float,
        entropy: bool,
        shard: VocabShard | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        start, valid = (0, logits_AV.shape[1]) if shard is None else (shard.start, shard.valid)
        columns = Columns(start, valid, temperature)
        stats = merge_row_stats(statistics_launch(logits_AV, labels_A, columns, entropy), shard, temperature)
        ignored_A = labels_A == IGNORED_LABEL
        entropy_A = stats.entropy().masked_fill(ignored_A, 0.0) if entropy else None
        ctx.save_for_backward(logits_AV, labels_A, *stats, entropy_A)
        ctx.columns, ctx.inplace = columns, inplace
        return stats.logprob(temperature).masked_fill(ignored_A, 0.0), entropy_A

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward("token_logprobs")
        logits_AV, labels_A, *stats, entropy_A = ctx.saved_tensors
        grad_logprob_A, grad_entropy_A = upstream
        if ctx.inplace:
            # Autograd compares versions, and a kernel's write changes none. The increment makes every other backward
            # that saved these logits raise instead of reading gradients.
            torch.autograd.graph.increment_version(logits_AV)
            grad_AV = logits_AV.detach()
        else:
            grad_AV = torch.empty(logits_AV.shape, dtype=logits_AV.dtype, device=logits_AV.device)
        rows = ScoredRows(labels_A, RowStats(*stats), entropy_A)
        grads = TokenGrads(grad_logprob_A, None if entropy_A is None else grad_entropy_A)
        gradient_launch(logits_AV, rows, grads, grad_AV, None, ctx.columns)
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
    """Return log-probs and entropies; see the public function."""
    return TokenLogprobs(*_TokenLogprobs.apply(logits_AV, labels_A, temperature, entropy, shard, inplace_backward))
