"""Causal attention of packed sequences by torch's SDPA: sequences of one length share a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..dispatch import played_kind


def packed_attention(
    q_THD: Tensor, k_KGD: Tensor, v_KGD: Tensor, lengths: list[int], key_lengths: list[int], window: int | None
) -> Tensor:
    """Return causal attention within each sequence: few launches, no T x T mask; see the public function."""
    if played_kind(q_THD.device.type) == "cpu" and q_THD.dtype in (torch.float16, torch.bfloat16):
        # Torch 2.13: on a CPU, SDPA in half precision takes up to 5 times as long as in fp32, and rounds its
        # intermediate results.
        attended = packed_attention(q_THD.float(), k_KGD.float(), v_KGD.float(), lengths, key_lengths, window)
        return attended.to(q_THD.dtype)
    shapes = list(zip(lengths, key_lengths, strict=True))
    if len(set(shapes)) == 1:
        return _equal_lengths(q_THD, k_KGD, v_KGD, *shapes[0], window)
    per_sequence = q_THD.split(lengths), k_KGD.split(key_lengths), v_KGD.split(key_lengths)
    indices_of_shape: dict[tuple[int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        indices_of_shape.setdefault(shape, []).append(index)
    out: dict[int, Tensor] = {}
    for shape, indices in indices_of_shape.items():
        if shape[0] == 0:
            for index in indices:
                out[index] = per_sequence[0][index]
            continue
        # A sequence that shares its length with none is read in place.
        q, k, v = (
            torch.cat([tensors[index] for index in indices]) if len(indices) > 1 else tensors[indices[0]]
            for tensors in per_sequence
        )
        for index, result in zip(indices, _equal_lengths(q, k, v, *shape, window).split(shape[0]), strict=True):
            out[index] = result
    return torch.cat([out[index] for index in range(len(shapes))])


def _equal_lengths(q_THD: Tensor, k_KGD: Tensor, v_KGD: Tensor, n: int, n_keys: int, window: int | None) -> Tensor:
    q = q_THD.unflatten(0, (-1, n)).transpose(1, 2)
    k, v = (t.unflatten(0, (-1, n_keys)).transpose(1, 2) for t in (k_KGD, v_KGD))
    grouped = q.shape[1] != k.shape[1]
    sees_all = window is None or window >= n_keys
    if sees_all and n == n_keys:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        step = n if window is None or sees_all else window
        out = torch.cat([_block(q, k, v, start, step, window, grouped) for start in range(0, n, step)], dim=2)
    return out.transpose(1, 2).flatten(0, 1)


def _block(q: Tensor, k: Tensor, v: Tensor, start: int, step: int, window: int | None, grouped: bool) -> Tensor:
    # A block of `window` queries sees fewer than 2 * window keys: work is linear in the length.
    end = min(start + step, q.shape[2])
    before = k.shape[2] - q.shape[2]  # keys before the first query's own
    rows = torch.arange(before + start, before + end, device=q.device)[:, None]
    first = 0 if window is None else max(0, before + start - window + 1)
    columns = torch.arange(first, before + end, device=q.device)
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    keys = slice(first, before + end)
    return scaled_dot_product_attention(
        q[:, :, start:end], k[:, :, keys], v[:, :, keys], attn_mask=visible, enable_gqa=grouped
    )
