"""The root-mean-square norm, alone and with the addition of a residual before it."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from .function import row_strides


def rms_norm(x: Tensor, weight_H: Tensor, *, eps: float = 1e-5, out: Tensor | None = None) -> Tensor:
    """Return the root-mean-square norm of the rows of x.

        y = x / sqrt(mean(x^2) + eps) * weight

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467). Computation is in fp32 (fp64 for fp64); the result is rounded
    once. A norm per head is a call on [..., heads, d] with a weight of d elements: views of heads are read in place.

    Args:
        x: [..., H] floating.
        weight_H: [H] floating.
        eps: Number >= 0.
        out: Like x, written in place; heads of a wider tensor are. It may be x itself. None: it is allocated.

    Returns:
        [..., H] in the dtype of x, contiguous; differentiable in x and weight_H. The gradient of the weight is summed
        over rows in fp32. `out` if it was passed, with the same bits and without a gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device or range is wrong, or a gradient would have to pass through `out`.
    """
    op = "rms_norm"
    _check(op, x, weight_H, eps)
    if out is not None:
        _check_out(op, out, (x, weight_H))
        validate.check_apart(op, "out", out, "x", x, same=True)
    normed: Tensor = select(op, x, weight_H)(x, weight_H, float(eps), out)
    return normed


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight_H: Tensor,
    *,
    eps: float = 1e-5,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
        out: Like x, takes y in place; it may be x or residual, not sum_out. None: it is allocated.
        sum_out: Like x, contiguous, takes the sum in place; it may be x or residual. None: it is allocated.

    Returns:
        (y, sum), like x and contiguous; differentiable in x, residual and weight_H. Results in `out` and `sum_out`
        have the same bits, and no gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device or range is wrong, buffers overlap, or a gradient would have to pass
            through one.
    """
    op = "add_rms_norm"
    if out is not None and validate.is_unchecked():
        return select(op, x, residual, weight_H)(x, residual, weight_H, eps, out, sum_out)
    _check(op, x, weight_H, eps)
    validate.check_floating(op, "residual", residual, tuple(x.shape), x)
    if residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual must be {x.dtype} like x, got {residual.dtype}")
    if out is not None:
        _check_out(op, out, (x, residual, weight_H))
        _check_apart(op, "out", out, x, residual)
    if sum_out is not None:
        validate.check_out(op, "sum_out", sum_out, tuple(x.shape), (x, residual, weight_H))
        validate.check_contiguous(op, "sum_out", sum_out)
        _check_apart(op, "sum_out", sum_out, x, residual)
        if out is not None:
            validate.check_apart(op, "out", out, "sum_out", sum_out)
    normed, total = select(op, x, residual, weight_H)(x, residual, weight_H, float(eps), out, sum_out)
    return normed, total


def _check_out(op: str, out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    validate.check_out(op, "out", out, tuple(inputs[0].shape), inputs)
    if row_strides(out) is None:
        raise ValueError(f"{op}: rows of out must be contiguous and at most two strides apart, got {out.stride()}")


def _check_apart(op: str, name: str, out: Tensor, x: Tensor, residual: Tensor) -> None:
    for other_name, other in (("x", x), ("residual", residual)):
        validate.check_apart(op, name, out, other_name, other, same=True)


def _check(op: str, x: Tensor, weight_H: Tensor, eps: float) -> None:
    validate.check_floating(op, "weight_H", weight_H, (None,))
    rows = (None,) * (x.dim() - 1) if isinstance(x, Tensor) else ()
    validate.check_floating(op, "x", x, (*rows, weight_H.shape[0]), weight_H)
    validate.check_plain_number(op, "eps", eps, low=0.0)
