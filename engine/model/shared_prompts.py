"""Attention over a packed stream in which the responses to a prompt share its rows.

Unlike textbook causal attention, a sequence is no run of rows: a response attends to the rows of its prompt, wherever
they are, and causally to itself. Each is ordinary attention with a log-sum-exp l, and both are merged:

    out = out_1 + (out_2 - out_1) * sigmoid(l_2 - l_1),    l = log(exp(l_1) + exp(l_2))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icegrt.kernels import packed_attention
from icegrt.model.attention_parts import PartKernels, Spans, part_kernels
from icegrt.packing.transfer import copy_to_device


class RepeatedKeys(NamedTuple):
    """The keys of every segment end to end, with those of the prompt before a response's own.

    rows_K: their rows in the stream, on the device.
    lengths: keys of each segment.
    cu_seqlens: int32 offsets of the segments' keys, on the device.
    """

    rows_K: Tensor
    lengths: list[int]
    cu_seqlens: Tensor


@dataclass(frozen=True, eq=False)
class PromptGroups:
    """The segments of a stream with shared prompts, as `PackedBatch` orders them. Layers share what is computed here.

    Attributes:
        lengths: of the shared prompts, of the responses to each of them, and of the segments that share nothing.
        sizes: number of responses to each shared prompt.
        cu_seqlens: int32 offsets of the segments, on the device; a CPU does without.
        cu_groups: int32 offsets of the responses to each prompt, from the first response, on the device.
    """

    lengths: list[int]
    sizes: list[int]
    cu_seqlens: Tensor | None = None
    cu_groups: Tensor | None = None
    _repeated: dict[int | None, RepeatedKeys] = field(default_factory=dict, init=False)

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each shared prompt."""
        return self.lengths[: len(self.sizes)]

    @cached_property
    def prompt_of_segment(self) -> list[int | None]:
        """For each segment the prompt that its rows attend to as well, or None."""
        shared = [prompt for prompt, size in enumerate(self.sizes) for _ in range(size)]
        n_others = len(self.lengths) - len(self.sizes) - len(shared)
        return [*[None] * len(self.sizes), *shared, *[None] * n_others]

    @cached_property
    def response_rows(self) -> slice:
        """Rows of all responses to shared prompts; the rows before are these prompts'."""
        start = sum(self.prompt_lengths)
        return slice(start, start + sum(self._group_lengths))

    @cached_property
    def _group_lengths(self) -> list[int]:
        totals = [0] * len(self.sizes)
        for prompt, length in zip(self.prompt_of_segment, self.lengths, strict=True):
            if prompt is not None:
                totals[prompt] += length
        return totals

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, with its prompt."""
        return max(
            length + (0 if prompt is None else self.lengths[prompt])
            for prompt, length in zip(self.prompt_of_segment, self.lengths, strict=True)
        )

    @cached_property
    def own_spans(self) -> Spans:
        """Every row attends causally within its segment."""
        return Spans(self.lengths, self.lengths, self.cu_seqlens, self.cu_seqlens, is_causal=True)

    @cached_property
    def prompt_spans(self) -> Spans:
        """The rows of `response_rows` attend to their prompt."""
        cu_prompts = None if self.cu_seqlens is None else self.cu_seqlens[: len(self.sizes) + 1]
        return Spans(self._group_lengths, self.prompt_lengths, self.cu_groups, cu_prompts, is_causal=False)

    def repeated_keys(self, window: int | None, device: torch.device) -> RepeatedKeys:
        """Return the keys of every segment, of a prompt only those that a response sees through `window`."""
        if window not in self._repeated:
            starts = list(accumulate(self.lengths, initial=0))
            runs: list[list[tuple[int, int]]] = []
            for prompt, start, end in zip(self.prompt_of_segment, starts, starts[1:], strict=False):
                runs.append([(start, end)])
                if prompt is not None:
                    seen = self.lengths[prompt] if window is None else min(self.lengths[prompt], window - 1)
                    runs[-1].insert(0, (starts[prompt + 1] - seen, starts[prompt + 1]))
            lengths = [sum(end - start for start, end in segment) for segment in runs]
            rows_K = torch.cat([torch.arange(*run) for segment in runs for run in segment])
            host = {"rows_K": rows_K, "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)}
            self._repeated[window] = RepeatedKeys(lengths=lengths, **copy_to_device(host, device, non_blocking=True))
        return self._repeated[window]


def shared_prompt_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    groups: PromptGroups,
    window: int | None = None,
    *,
    varlen: Callable | None = None,
) -> Tensor:
    """Return causal attention of sequences that share prompts.

    Two calls over the stream and a merge: no key is copied. Sliding windows, and dtypes and devices for which torch
    returns no log-sum-exp, repeat the keys of a prompt for each of its responses: of a window, at most `window - 1`.

    Args:
        q_THD: queries, [T, heads, d]; on a CPU fp32 or fp64.
        k_THD: keys, [T, kv_heads, d].
        v_THD: values, [T, kv_heads, d].
        groups: the segments of the stream.
        window: how many tokens a token attends to, itself included; None attends to all before it.
        varlen: flash-attn's `flash_attn_varlen_func`; None: SDPA attends to repeated keys.

    Returns:
        [T, heads, d], in the dtype of the queries.
    """
    window = window if window is not None and window < groups.longest else None
    kernels = part_kernels(q_THD) if window is None else None
    if kernels is not None:
        out: Tensor = _MergedAttention.apply(q_THD, k_THD, v_THD, groups, kernels)
        return out
    keys = groups.repeated_keys(window, q_THD.device)
    k_KGD, v_KGD = k_THD[keys.rows_K], v_THD[keys.rows_K]
    if varlen is None:
        return packed_attention(q_THD, k_KGD, v_KGD, groups.lengths, key_lengths=keys.lengths, window=window)
    longest = max(groups.lengths), max(keys.lengths)
    # flash-attn aligns the last query with the last key. Its window excludes the current token.
    sides = {} if window is None else {"window_size": (window - 1, 0)}
    attended: Tensor = varlen(q_THD, k_KGD, v_KGD, groups.cu_seqlens, keys.cu_seqlens, *longest, causal=True, **sides)
    return attended


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: PromptGroups, kernels: PartKernels) -> Tensor:
        responses, prompts = groups.response_rows, slice(groups.response_rows.start)
        # 1. Every segment by itself; of responses, the prompt too.
        out, lse_TH, own_state = kernels.forward(q, k, v, groups.own_spans)
        seen, seen_lse, prompt_state = kernels.forward(q[responses], k[prompts], v[prompts], groups.prompt_spans)
        # 2. Merge, in the precision of the log-sum-exp.
        own, own_lse = out[responses], lse_TH[responses]
        weight = torch.sigmoid(seen_lse - own_lse)[..., None]
        own.copy_(torch.lerp(own.to(weight.dtype), seen.to(weight.dtype), weight))
        own_lse.copy_(torch.logaddexp(own_lse, seen_lse))
        ctx.save_for_backward(q, k, v, out, lse_TH)
        ctx.groups, ctx.kernels, ctx.states = groups, kernels, (own_state, prompt_state)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_TH = ctx.saved_tensors
        groups, kernels, (own_state, prompt_state) = ctx.groups, ctx.kernels, ctx.states
        responses, prompts = groups.response_rows, slice(groups.response_rows.start)
        grad = upstream[0].contiguous()
        dq, dk, dv = kernels.backward(grad, q, k, v, out, lse_TH, groups.own_spans, own_state)
        of_rows = (x[responses] for x in (grad, q))
        merged = (x[responses] for x in (out, lse_TH))
        parts = kernels.backward(*of_rows, k[prompts], v[prompts], *merged, groups.prompt_spans, prompt_state)
        for total, part, rows in zip((dq, dk, dv), parts, (responses, prompts, prompts), strict=True):
            total[rows] += part
        return dq, dk, dv, None, None
