"""Causal attention of packed sequences by torch's SDPA: sequences of one length share a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def packed_sdpa(
    q_THD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    lengths: list[int],
    key_lengths: list[int],
    window: int | None = None,
) -> Tensor:
    """Return causal attention of sequences whose queries are those of their last tokens: few launches, no T x T mask.

    Args:
        q_THD: queries, [T, heads, d], any float dtype.
        k_KGD: keys, [K, kv_heads, d].
        v_KGD: values, [K, kv_heads, d].
        lengths: queries of each sequence; they sum to T.
        key_lengths: keys of each sequence, at least as many as queries; they sum to K.
        window: how many tokens a token attends to, itself included; None attends to all before it.

    Returns:
        [T, heads, d], in the dtype of the queries.
    """
    shapes = list(zip(lengths, key_lengths, strict=True))
    if len(set(shapes)) == 1:
        return _equal_lengths(q_THD, k_KGD, v_KGD, *shapes[0], window)
    per_sequence = q_THD.split(lengths), k_KGD.split(key_lengths), v_KGD.split(key_lengths)
    indices_of_shape: dict[tuple[int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        indices_of_shape.setdefault(shape, []).append(index)
    out: list[Tensor] = [None] * len(shapes)
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
    return torch.cat(out)


def _equal_lengths(q_THD: Tensor, k_KGD: Tensor, v_KGD: Tensor, n: int, n_keys: int, window: int | None) -> Tensor:
    q = q_THD.unflatten(0, (-1, n)).transpose(1, 2)
    k, v = (t.unflatten(0, (-1, n_keys)).transpose(1, 2) for t in (k_KGD, v_KGD))
    grouped = q.shape[1] != k.shape[1]
    sees_all = window is None or window >= n_keys
    if sees_all and n == n_keys:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        step = n if sees_all else window
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
