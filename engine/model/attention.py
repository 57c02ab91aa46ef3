"""Block-diagonal causal attention over a packed stream, and over a KV cache while decoding.

Departs from the textbook in that nothing is padded: the stream's sequences are attended to one length at a time
(equal lengths in one call), and sequences never see each other. Megatron's own attention refuses packed streams
without Transformer Engine, so this is the `core_attention` of every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_FLASH_DTYPES = (torch.float16, torch.bfloat16)


class PrefillWriter(Protocol):
    """What a prefill asks of a KV cache: to take its keys and values over."""

    def write(self, layer: int, k_THD: Tensor, v_THD: Tensor, lengths: list[int]) -> None: ...


class Cache(Protocol):
    """What a decode step asks of a KV cache (`icegrt.rollout.cache` has both)."""

    def attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, window: int | None) -> Tensor: ...


@dataclass
class AttentionMetadata(PackedSeqParams):
    """How the rows of the stream attend. Travels through Megatron's layers as their `packed_seq_params`.

    Training and prefill: `lengths` of the sequences in stream order, and for a prefill a `prefill_writer`. Decoding:
    a `cache` with one new row per active sequence.
    """

    # Not 'thd': Megatron's thd path synchronises per layer and rotates by its own table instead of by positions.
    qkv_format: str = "stream"
    lengths: list[int] = field(default_factory=list)
    prefill_writer: PrefillWriter | None = None
    cache: Cache | None = None


class PackedAttention(nn.Module):
    """`core_attention` of a layer: [T, 1, heads, d] query, key and value -> [T, 1, heads * d]."""

    def __init__(self, config, layer_number: int, *args, **kwargs) -> None:
        super().__init__()
        # Its place among the layers that this rank holds, which is also its place in a KV cache.
        self.layer = layer_number - 1
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, packed_seq_params=None, **kwargs) -> Tensor:
        plan: AttentionMetadata = packed_seq_params
        q_THD, k_THD, v_THD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan.cache is not None:
            out = plan.cache.attend(self.layer, q_THD, k_THD, v_THD, self.window)
        else:
            if plan.prefill_writer is not None:
                plan.prefill_writer.write(self.layer, k_THD, v_THD, plan.lengths)
            out = packed_causal_attention(q_THD, k_THD, v_THD, plan.lengths, self.window)
        return out.reshape(out.shape[0], 1, -1)


def packed_causal_attention(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, lengths: list[int], window: int | None = None
) -> Tensor:
    """Causal attention within each sequence of a stream.

    Args: q [T, heads, d], k and v [T, kv_heads, d], any float dtype; `lengths` sum to T. `window`: the most tokens that
    a token sees, itself included; None sees all before it.
    Returns [T, heads, d]. One call of flash-attn where it is installed and takes these tensors (CUDA, half precision);
    elsewhere sequences of one length share a call of SDPA: fewer launches, and no dense T x T mask.
    """
    varlen = flash_attention() if q_THD.is_cuda and q_THD.dtype in _FLASH_DTYPES else None
    if varlen is not None:
        return flash_varlen_attention(varlen, q_THD, k_THD, v_THD, lengths, window)
    if len(set(lengths)) == 1:
        return _equal_lengths(q_THD, k_THD, v_THD, lengths[0], window)
    parts = [tensor.split(lengths) for tensor in (q_THD, k_THD, v_THD)]
    order: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        order.setdefault(length, []).append(index)
    out: list[Tensor] = [None] * len(lengths)
    for length, members in order.items():
        if length == 0:
            for index in members:
                out[index] = parts[0][index]
            continue
        together = [torch.cat([part[index] for index in members]) for part in parts]
        for index, result in zip(members, _equal_lengths(*together, length, window).split(length), strict=True):
            out[index] = result
    return torch.cat(out)


def _equal_lengths(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, length: int, window: int | None) -> Tensor:
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q_THD, k_THD, v_THD))
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= length:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        out = torch.cat([_window_block(q, k, v, start, window, grouped) for start in range(0, length, window)], dim=2)
    return out.transpose(1, 2).flatten(0, 1)


def _window_block(q: Tensor, k: Tensor, v: Tensor, start: int, window: int, grouped: bool) -> Tensor:
    # `window` queries at a time see fewer than 2 * window keys: the work grows with the length, not with its square.
    rows = torch.arange(start, min(start + window, q.shape[2]), device=q.device)[:, None]
    first = max(0, start - window + 1)
    columns = torch.arange(first, start + len(rows), device=q.device)
    visible = (columns <= rows) & (columns > rows - window)
    keys = slice(first, start + len(rows))
    return scaled_dot_product_attention(
        q[:, :, start : start + len(rows)], k[:, :, keys], v[:, :, keys], attn_mask=visible, enable_gqa=grouped
    )


def flash_varlen_attention(
    attend: Callable, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, lengths: list[int], window: int | None = None
) -> Tensor:
    """Return `packed_causal_attention` by one call of `attend`, which is flash-attn's `flash_attn_varlen_func`."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q_THD.device)
    longest = max(lengths)
    # flash-attn counts the tokens to the left of the current one.
    sides = {} if window is None else {"window_size": (window - 1, 0)}
    return attend(q_THD, k_THD, v_THD, ends, ends, longest, longest, causal=True, **sides)


@cache
def flash_attention() -> Callable | None:
    """flash-attn's variable-length attention, or None where it is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func
