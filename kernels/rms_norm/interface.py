"""The root-mean-square norm, alone and with the addition of a residual before it."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select


def rms_norm(x: Tensor, weight_H: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return the root-mean-square norm of the rows of x.

        y = x / sqrt(mean(x^2) + eps) * weight

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467). Computation is in fp32 (fp64 for fp64); the result is rounded
    once. A norm per head is a call on [..., heads, d] with a weight of d elements: views of heads are read in place.

    Args:
        x: [..., H] floating.
        weight_H: [H] floating.
        eps: Number >= 0.

    Returns:
        [..., H] in the dtype of x, contiguous; differentiable in x and weight_H. The gradient of the weight is summed
        over rows in fp32.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong.
    """
    _check("rms_norm", x, weight_H, eps)
    normed: Tensor = select("rms_norm", x, weight_H)(x, weight_H, float(eps))
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight_H: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum itself: one pass instead of two.

        sum = x + residual
        y = sum / sqrt(mean(sum^2) + eps) * weight

    The sum is rounded to the dtype of x before it is normalised: both results equal those of an addition and
    `rms_norm`, to the bit.

    Args:
        x: [..., H] floating.
        residual: like x.
        weight_H: [H] floating.
        eps: Number >= 0.

    Returns:
        (y, sum), like x and contiguous; differentiable in x, residual and weight_H.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong.
    """
    op = "add_rms_norm"
    _check(op, x, weight_H, eps)
    validate.check_floating(op, "residual", residual, tuple(x.shape), x)
    if residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual must be {x.dtype} like x, got {residual.dtype}")
    normed, total = select(op, x, residual, weight_H)(x, residual, weight_H, float(eps))
    return normed, total


def _check(op: str, x: Tensor, weight_H: Tensor, eps: float) -> None:
    validate.check_floating(op, "weight_H", weight_H, (None,))
    rows = (None,) * (x.dim() - 1) if isinstance(x, Tensor) else ()
    validate.check_floating(op, "x", x, (*rows, weight_H.shape[0]), weight_H)
    validate.check_plain_number(op, "eps", eps, low=0.0)
