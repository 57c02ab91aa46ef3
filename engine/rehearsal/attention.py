"""Attention as the rehearsed GPU runs it: flash-attn over packed streams, and the fused or plain SDPA of torch.

Each is an operator with a declared cost. It computes nothing: the meta device alone runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from icegrt.kernels.common.operators import Cost, device_operator, tensor_bytes
from icegrt.model.attention_parts import PartKernels, Spans
from icegrt.rehearsal.shadows import values_of

_HALF = (torch.float16, torch.bfloat16)
# flash-attn 2: the sum of out * gradient, the kernel, the conversion of dQ; grouped heads add the sums of dK and dV.
_BACKWARD_LAUNCHES, _GROUP_LAUNCHES = 3, 2


def attended_pairs(lengths: list[int], window: int | None) -> int:
    """Return the pairs of query and key of causal attention within sequences."""
    total = 0
    for length in lengths:
        inside = length if window is None else min(length, window)
        total += inside * (inside + 1) // 2 + (length - inside) * inside
    return total


def _pairs(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, window: int, is_causal: bool) -> int:
    lengths, key_lengths = (
        [len(x)] if offsets is None else offsets.diff().tolist()
        for x, offsets in ((q, values_of(cu_seqlens)), (k, values_of(cu_seqlens_k)))
    )
    if not is_causal:
        return sum(n * n_keys for n, n_keys in zip(lengths, key_lengths, strict=True))
    # The last query is aligned with the last key.
    before = [n_keys - n for n, n_keys in zip(lengths, key_lengths, strict=True)]
    limit = window if window > 0 else None
    return attended_pairs(key_lengths, limit) - attended_pairs(before, limit)


def _forward_cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    is_causal: bool,
) -> Cost:
    flops = 4 * q.shape[1] * q.shape[2] * _pairs(q, k, cu_seqlens, cu_seqlens_k, window, is_causal)
    return Cost.of_pass([q, k, v, cu_seqlens, cu_seqlens_k], [out, lse], flops)


@device_operator(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor(a!) out, "
    "Tensor(b!) lse, int window, bool is_causal)",
    _forward_cost,
)
def _forward_step(*args: Any) -> None:
    raise NotImplementedError("attention_forward is an operator of rehearsals: it computes nothing")


def _backward_cost(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    window: int,
    is_causal: bool,
) -> Cost:
    # Five products of the size of the forward's two.
    flops = 10 * q.shape[1] * q.shape[2] * _pairs(q, k, cu_seqlens, cu_seqlens_k, window, is_causal)
    is_grouped = k.shape[1] != q.shape[1]
    # dQ is added up in fp32, and grouped heads write dK and dV of every query head before they are summed.
    scratch = 2 * q.numel() * 4 + (4 * k.shape[0] * q[0].numel() * q.element_size() if is_grouped else 0)
    reads = sum(map(tensor_bytes, (grad, q, k, v, out, lse, cu_seqlens, cu_seqlens_k))) + scratch // 2
    writes = sum(map(tensor_bytes, (dq, dk, dv))) + scratch // 2
    return Cost(_BACKWARD_LAUNCHES + _GROUP_LAUNCHES * is_grouped, flops, reads, writes)


@device_operator(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "Tensor cu_seqlens_k, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, int window, bool is_causal)",
    _backward_cost,
)
def _backward_step(*args: Any) -> None:
    raise NotImplementedError("attention_backward is an operator of rehearsals: it computes nothing")


def _forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int = 0) -> tuple[Tensor, Tensor, tuple[()]]:
    assert spans.cu_seqlens is not None and spans.cu_seqlens_k is not None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_HT = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    _forward_step(q, k, v, spans.cu_seqlens, spans.cu_seqlens_k, out, lse_HT, window, spans.is_causal)
    return out, lse_HT.t(), ()


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_TH: Tensor,
    spans: Spans,
    state: tuple[Tensor, ...],
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    lse_HT, offsets = lse_TH.t().contiguous(), (spans.cu_seqlens, spans.cu_seqlens_k)
    accumulated = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    is_grouped = k.shape[1] != q.shape[1]
    expanded = [q.new_empty(k.shape[0], *q.shape[1:]) for _ in range(2)] if is_grouped else []
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _backward_step(grad, q, k, v, out, lse_HT, *offsets, dq, dk, dv, window, spans.is_causal)
    del accumulated, expanded
    return dq, dk, dv


REHEARSED_KERNELS = PartKernels(_forward, _backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int) -> Tensor:
        # flash-attn copies a tensor whose last dimension is not dense.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse_TH, _ = _forward(q, k, v, spans, window)
        ctx.save_for_backward(q, k, v, out, lse_TH)
        ctx.spans, ctx.window = spans, window
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        (grad,) = upstream
        return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.spans, (), ctx.window), None, None


def attend_varlen(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Return attention as `flash_attn.flash_attn_varlen_func` does: one launch for all sequences."""
    spans = Spans([], [], cu_seqlens_q, cu_seqlens_k, is_causal=causal)
    # flash-attn's window excludes the current token.
    out: Tensor = _Attention.apply(q_THD, k_THD, v_THD, spans, window_size[0] + 1 if window_size[0] >= 0 else 0)
    return out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Return attention as torch does on CUDA: fused where flash or memory-efficient attention takes the inputs.

    Flash takes half precision without a mask. The memory-efficient kernel takes masks, but no grouped heads. All else
    is the plain formula, whose operations are counted one by one.
    """
    fused = (attn_mask is None and query.dtype in _HALF) or not enable_gqa
    if not fused:
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, 0.0, is_causal, None, enable_gqa=enable_gqa
        )
        return out
    attended: Tensor = _DenseAttention.apply(query, key, value, attn_mask, is_causal)
    return attended


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _dense_step(q, k, v, mask, out, lse, is_causal)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.is_causal = is_causal
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _dense_backward_step(upstream[0].contiguous(), q, k, v, mask, out, lse, dq, dk, dv, ctx.is_causal)
        return dq, dk, dv, None, None


def _dense_pairs(q: Tensor, k: Tensor, is_causal: bool) -> int:
    return q.shape[0] * q.shape[2] * k.shape[2] // (2 if is_causal else 1)


def _dense_cost(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, is_causal: bool
) -> Cost:
    return Cost.of_pass([q, k, v, mask], [out, lse], 4 * q.shape[1] * q.shape[3] * _dense_pairs(q, k, is_causal))


@device_operator(
    "attention_dense(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor(a!) out, Tensor(b!) lse, bool is_causal)",
    _dense_cost,
)
def _dense_step(*args: Any) -> None:
    raise NotImplementedError("attention_dense is an operator of rehearsals: it computes nothing")


def _dense_backward_cost(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    is_causal: bool,
) -> Cost:
    flops = 10 * q.shape[1] * q.shape[3] * _dense_pairs(q, k, is_causal)
    return Cost.of_pass([grad, q, k, v, mask, out, lse], [dq, dk, dv], flops, launches=_BACKWARD_LAUNCHES)


@device_operator(
    "attention_dense_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, bool is_causal)",
    _dense_backward_cost,
)
def _dense_backward_step(*args: Any) -> None:
    raise NotImplementedError("attention_dense_backward is an operator of rehearsals: it computes nothing")
