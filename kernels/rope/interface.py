"""Rotary position embeddings of queries and keys together, from tables of cosines and sines by token."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select

# Legend: T, tokens; N, query heads; G, key/value heads (groups); M, heads of a group: its queries, key and value;
# D, elements of a head; R = D / 2.


def rope(q_TND: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys, rotated by the angles of their tokens.

        y[j] = x[j] cos[j] - x[j + R] sin[j],   y[j + R] = x[j + R] cos[j] + x[j] sin[j],   j < R

    Source: Su et al. 2021 (arXiv:2104.09864), with the halves of a head as pairs, as transformers orders them. The
    tables are formed once for a stream and serve all layers. Computation is in fp32 (fp64 for fp64).

    Args:
        q_TND: [T, N, D] floating. Views of heads are read in place.
        k_TGD: [T, G, D], dtype of q_TND.
        cos_TR: [T, D / 2] floating, cosines of the angles.
        sin_TR: [T, D / 2] floating, sines.

    Returns:
        (q, k), contiguous, differentiable in q_TND and k_TGD. The gradient is the inverse rotation.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape or device is wrong.
    """
    op = "rope"
    validate.check_floating(op, "q_TND", q_TND, (None, None, None))
    tokens, _, width = q_TND.shape
    validate.check_floating(op, "k_TGD", k_TGD, (tokens, None, width), q_TND)
    if k_TGD.dtype != q_TND.dtype:
        raise TypeError(f"{op}: k_TGD must be {q_TND.dtype} like q_TND, got {k_TGD.dtype}")
    _check_tables(op, cos_TR, sin_TR, tokens, width, q_TND)
    q, k = select(op, q_TND, k_TGD)(q_TND, k_TGD, cos_TR.detach(), sin_TR.detach())
    return q, k


def rope_qkv(qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values, of a fused projection: `rope` without the copies of a split.

    A group has its queries first, then its key and its value, as Megatron-core orders the rows of a fused projection.

    Args:
        qkv_TGMD: [T, G, M, D] floating, M >= 3.
        cos_TR: [T, D / 2] floating, cosines of the angles.
        sin_TR: [T, D / 2] floating, sines.

    Returns:
        (q [T, G (M - 2), D], k [T, G, D], v [T, G, D]), contiguous, differentiable in qkv_TGMD. No view of the
        projection remains, so its memory is free afterwards.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape or device is wrong.
    """
    op = "rope_qkv"
    check_qkv(op, qkv_TGMD, cos_TR, sin_TR)
    q, k, v = select(op, qkv_TGMD)(qkv_TGMD, cos_TR.detach(), sin_TR.detach())
    return q, k, v


def check_qkv(op: str, qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    """Raise unless qkv_TGMD is a fused projection, with a row of the tables for each token."""
    validate.check_floating(op, "qkv_TGMD", qkv_TGMD, (None, None, None, None))
    tokens, _, heads, width = qkv_TGMD.shape
    if heads < 3:
        raise ValueError(f"{op}: qkv_TGMD must have 3 or more heads by group, got shape {tuple(qkv_TGMD.shape)}")
    _check_tables(op, cos_TR, sin_TR, tokens, width, qkv_TGMD)


def _check_tables(op: str, cos_TR: Tensor, sin_TR: Tensor, tokens: int, width: int, like: Tensor) -> None:
    if width % 2:
        raise ValueError(f"{op}: heads must have an even number of elements, got {width}")
    for name, table in (("cos_TR", cos_TR), ("sin_TR", sin_TR)):
        validate.check_floating(op, name, table, (tokens, width // 2), like)
