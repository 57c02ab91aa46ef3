"""Attention of packed sequences together with its log-sum-exp: the parts that a merge needs.

A part's backward takes the output and the log-sum-exp of the merged attention, and returns the part's share of the
exact gradient: with s the scores of the part and dP = dO v^T,

    p = exp(s - lse),    ds = p * (dP - sum(dO * out))

(Dao, FlashAttention-2, 2023, algorithm 2). The softmax of the part alone appears nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten
_FLASH_HEAD_DIM = 256  # the largest of torch's flash attention, which takes multiples of 8


@dataclass(frozen=True, eq=False)
class Spans:
    """Which keys the rows of a part attend to: those of their own span, up to their own row if `is_causal`.

    Attributes:
        lengths: queries of each span.
        key_lengths: keys of each span.
        cu_seqlens: int32 offsets of the queries, on the device; the CPU does without.
        cu_seqlens_k: int32 offsets of the keys.
        is_causal: whether the span's queries and keys are the same rows, each attending to itself and those before it.
    """

    lengths: list[int]
    key_lengths: list[int]
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    is_causal: bool


class Forward(Protocol):
    """Attention of spans: [T, heads, d] queries and [K, kv_heads, d] keys and values."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the output [T, heads, d], its log-sum-exp [T, heads], and what the backward needs besides."""
        ...


class Backward(Protocol):
    """Gradients of spans' queries, keys and values, given output and log-sum-exp of the merged attention."""

    def __call__(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse_TH: Tensor,
        spans: Spans,
        state: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        ...


class PartKernels(NamedTuple):
    """Forward and backward of a part on one kind of device."""

    forward: Forward
    backward: Backward


def part_kernels(q: Tensor) -> PartKernels | None:
    """Return the kernels for such queries; None if torch has none that return a log-sum-exp for packed sequences."""
    if q.device.type == "cpu":
        return CPU_KERNELS
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= _FLASH_HEAD_DIM
    return flash_kernels() if q.is_cuda and is_half and fits else None


def flash_kernels() -> PartKernels | None:
    """Return torch's flash attention over packed sequences; None if torch was built without."""
    return FLASH_KERNELS if torch.backends.cuda.is_flash_attention_available() else None


# -- CPU ---------------------------------------------------------------------------------------------------------------


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    out, lse_TH = torch.empty_like(q), q.new_empty(q.shape[:2])
    for rows, keys in _calls(spans):
        part, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            rows.heads(q), keys.heads(k), keys.heads(v), 0.0, spans.is_causal
        )
        rows.write(out, part.transpose(1, 2))
        rows.write(lse_TH, lse.transpose(1, 2))
    return out, lse_TH, ()


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_TH: Tensor,
    spans: Spans,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _calls(spans):
        arguments = rows.heads(grad), rows.heads(q), keys.heads(k), keys.heads(v), rows.heads(out)
        lse = rows.read(lse_TH).transpose(1, 2)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, lse, 0.0, spans.is_causal)
        for span, x, part in zip((rows, keys, keys), (dq, dk, dv), grads, strict=True):
            span.write(x, part.transpose(1, 2))
    return dq, dk, dv


CPU_KERNELS = PartKernels(_cpu_forward, _cpu_backward)


class _Rows(NamedTuple):
    """Rows of spans of one length in a stream."""

    starts: list[int]
    length: int

    def _slices(self) -> list[slice]:
        if self.starts == list(range(self.starts[0], self.starts[0] + len(self.starts) * self.length, self.length)):
            return [slice(self.starts[0], self.starts[0] + len(self.starts) * self.length)]
        return [slice(start, start + self.length) for start in self.starts]

    def read(self, x: Tensor) -> Tensor:
        """Return the rows of x [T, ...] as [spans, length, ...]: a view if they are adjacent."""
        slices = self._slices()
        rows = x[slices[0]] if len(slices) == 1 else torch.cat([x[each] for each in slices])
        return rows.unflatten(0, (len(self.starts), self.length))

    def heads(self, x: Tensor) -> Tensor:
        """Return the rows of x [T, heads, d] as [spans, heads, length, d]."""
        return self.read(x).transpose(1, 2)

    def write(self, x: Tensor, values: Tensor) -> None:
        """Set the rows of x [T, ...] to values [spans, length, ...]."""
        slices = self._slices()
        for each, part in zip(
            slices, values.flatten(0, 1).split(len(values) * self.length // len(slices)), strict=True
        ):
            x[each] = part


def _calls(spans: Spans) -> Iterator[tuple[_Rows, _Rows]]:
    """Yield the queries and keys of each call: spans of equal shapes share one."""
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    starts = zip(accumulate(spans.lengths, initial=0), accumulate(spans.key_lengths, initial=0), strict=True)
    for shape, start in zip(zip(spans.lengths, spans.key_lengths, strict=True), starts, strict=False):
        if shape[0]:
            members.setdefault(shape, []).append(start)
    for (length, key_length), pairs in members.items():
        q_starts, k_starts = zip(*pairs, strict=True)
        yield _Rows(list(q_starts), length), _Rows(list(k_starts), key_length)


# -- CUDA --------------------------------------------------------------------------------------------------------------


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    out, lse_HT, *state, _ = aten._flash_attention_forward(q, k, v, *_flash_spans(spans), 0.0, spans.is_causal, False)
    return out, lse_HT.t(), tuple(state)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_TH: Tensor,
    spans: Spans,
    state: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = aten._flash_attention_backward(
        grad, q, k, v, out, lse_TH.t().contiguous(), *_flash_spans(spans), 0.0, spans.is_causal, *state
    )
    return grads


def _flash_spans(spans: Spans) -> tuple[Tensor | None, Tensor | None, int, int]:
    return spans.cu_seqlens, spans.cu_seqlens_k, max(spans.lengths), max(spans.key_lengths)


FLASH_KERNELS = PartKernels(_flash_forward, _flash_backward)
