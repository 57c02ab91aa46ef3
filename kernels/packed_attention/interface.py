"""Causal attention of packed sequences, with its gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import validate
from ..dispatch import select

# Legend: T, queries of all sequences; K, their keys; N, query heads; G, key/value heads; D, elements of a head.


def packed_attention(
    q_TND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    lengths: Sequence[int],
    *,
    key_lengths: Sequence[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """Return causal attention within each sequence of a stream; no sequence sees another.

        out = softmax(q . k / sqrt(D)) v   over the keys up to a query's own

    Source: Vaswani et al. 2017 (arXiv:1706.03762). In C++ sums are in fp32 (fp64 for fp64), the result is rounded once,
    and the bits of a sequence depend on that sequence alone.

    Args:
        q_TND: [T, N, D] floating; N is a multiple of G. The queries of a sequence are those of its last keys.
        k_KGD: [K, G, D], dtype of q_TND.
        v_KGD: like k_KGD.
        lengths: queries of each sequence; they sum to T.
        key_lengths: keys of each sequence, at least as many as its queries; they sum to K. None: as many.
        window: keys that a query attends to, its own included; None: all up to its own.

    Returns:
        [T, N, D] in the dtype of q_TND.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device, length or window is wrong.
    """
    op = "packed_attention"
    validate.check_floating(op, "q_TND", q_TND, (None, None, None))
    width = q_TND.shape[2]
    for name, x in (("k_KGD", k_KGD), ("v_KGD", v_KGD)):
        validate.check_floating(op, name, x, (None, None, width), q_TND)
        if x.dtype != q_TND.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of q_TND, {q_TND.dtype}, got {x.dtype}")
    if k_KGD.shape != v_KGD.shape:
        raise ValueError(f"{op}: v_KGD must have the shape of k_KGD, {tuple(k_KGD.shape)}, got {tuple(v_KGD.shape)}")
    if k_KGD.shape[1] == 0 or q_TND.shape[1] % k_KGD.shape[1]:
        raise ValueError(f"{op}: the {q_TND.shape[1]} heads of q_TND must be a multiple of those of k_KGD")
    lengths = list(lengths)
    keys = lengths if key_lengths is None else list(key_lengths)
    if sum(lengths) != q_TND.shape[0] or sum(keys) != k_KGD.shape[0] or len(lengths) != len(keys):
        raise ValueError(f"{op}: lengths must sum to the rows of q_TND, and key_lengths to those of k_KGD")
    if any(not 0 <= n <= n_keys for n, n_keys in zip(lengths, keys, strict=True)):
        raise ValueError(f"{op}: a sequence must have at least as many keys as queries, and no negative number")
    if window is not None:
        validate.check_plain_number(op, "window", window, low=1)
    attended: Tensor = select(op, q_TND)(q_TND, k_KGD, v_KGD, lengths, keys, window)
    return attended
