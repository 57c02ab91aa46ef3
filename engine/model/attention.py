"""Block-diagonal causal attention over a packed stream.

Unlike textbook attention nothing is padded, and no sequence sees another. Only the rows of a prompt may be shared
(`shared_prompts.py`).

Megatron 0.16: its own attention needs Transformer Engine for packed streams -> this module is the `core_attention` of
every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from icegrt.kernels import packed_attention
from icegrt.kernels.dispatch import played_kind
from icegrt.model.shared_prompts import PromptGroups, shared_prompt_attention

_FLASH_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionMetadata:
    """How the rows of a stream attend. Megatron's layers pass it on as their `packed_seq_params`.

    Attributes:
        lengths: lengths of the sequences in stream order, on the host; with `groups`, of the segments.
        cu_seqlens: their int32 offsets, N + 1 of them, on the device; None: flash-attn's offsets are copied there.
        groups: the segments of a stream with shared prompts; None: no prompt is shared.
        qkv_format: the one field that Megatron reads.
    """

    # Megatron 0.16: the format 'thd' synchronises in every layer and rotates by a table of its own -> we use a name
    # that it does not know, and rotate by the stream's positions.
    qkv_format: str = "stream"
    lengths: list[int] = field(default_factory=list)
    cu_seqlens: Tensor | None = None
    groups: PromptGroups | None = None


class PackedAttention(nn.Module):
    """`core_attention` of a layer: [T, 1, heads, d] query, key and value -> [T, 1, heads * d].

    Args:
        config: Megatron's TransformerConfig as `Architecture.transformer_config` builds it.
        layer_number: number of the layer in the whole model, from 1.
    """

    def __init__(self, config, layer_number: int, *args, **kwargs) -> None:
        super().__init__()
        windowed = config.window_size is not None and config.window_attn_skip_freq[layer_number - 1]
        self.window = config.window_size[0] + 1 if windowed else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, packed_seq_params=None, **kwargs) -> Tensor:
        metadata: AttentionMetadata = packed_seq_params
        q_THD, k_THD, v_THD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        out = packed_causal_attention(
            q_THD,
            k_THD,
            v_THD,
            metadata.lengths,
            self.window,
            cu_seqlens=metadata.cu_seqlens,
            groups=metadata.groups,
        )
        return out.reshape(out.shape[0], 1, -1)


def packed_causal_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    lengths: list[int],
    window: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    groups: PromptGroups | None = None,
) -> Tensor:
    """Return causal attention within each sequence of a stream.

    One call of flash-attn if it is installed and supports the tensors (CUDA, half precision), and one of the C++ kernel
    on a CPU. Otherwise sequences of one length share a call of SDPA: few launches, and no dense T x T mask.

    Args:
        q_THD: queries, [T, heads, d], any float dtype.
        k_THD: keys, [T, kv_heads, d].
        v_THD: values, [T, kv_heads, d].
        lengths: lengths of the sequences; they sum to T.
        window: how many tokens a token attends to, itself included; None attends to all before it.
        cu_seqlens: offsets of the sequences, [N + 1] int32, on the device. Without them flash-attn's call waits for a
            copy of `lengths` to the device.
        groups: the segments, if sequences share prompts.

    Returns:
        [T, heads, d], in the dtype of the queries.
    """
    varlen = flash_attention() if q_THD.is_cuda and q_THD.dtype in _FLASH_DTYPES else None
    if varlen is not None and groups is None:
        return flash_varlen_attention(varlen, q_THD, k_THD, v_THD, lengths, window, cu_seqlens=cu_seqlens)
    if groups is None:
        return packed_attention(q_THD, k_THD, v_THD, lengths, window=window)
    # Torch 2.13: on a CPU, SDPA in half precision takes up to 5 times as long as in fp32, copies included -> widened.
    widened = played_kind(q_THD.device.type) == "cpu" and q_THD.dtype in _FLASH_DTYPES
    heads = [tensor.float() if widened else tensor for tensor in (q_THD, k_THD, v_THD)]
    return shared_prompt_attention(*heads, groups, window, varlen=varlen).to(q_THD.dtype)


def flash_varlen_attention(
    attend: Callable,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    lengths: list[int],
    window: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return `packed_causal_attention` by one call of `attend`, which is flash-attn's `flash_attn_varlen_func`."""
    ends = cu_seqlens
    if ends is None:
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(q_THD.device)
    longest = max(lengths)
    # flash-attn's window excludes the current token.
    sides = {} if window is None else {"window_size": (window - 1, 0)}
    return attend(q_THD, k_THD, v_THD, ends, ends, longest, longest, causal=True, **sides)


@cache
def flash_attention() -> Callable | None:
    """Return flash-attn's variable-length attention; None if it is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func
