"""A projection of a decode step: x @ weight.T + bias, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..dispatch import select

# Legend: N, rows; K, elements that are summed; M, outputs.


def decode_linear(
    x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return x @ weight.T + bias. Sums are in fp32 (fp64 for fp64) and are rounded once.

    In C++ the bits of an fp32 row depend neither on the number of rows nor on threads. A product of torch gives no such
    guarantee.

    Args:
        x_NK: [N, K] floating.
        weight_MK: [M, K], dtype of x_NK.
        bias_M: [M], dtype of x_NK, or None.
        out: [N, M], dtype of x_NK, contiguous, written in place; None: it is allocated.

    Returns:
        [N, M] in the dtype of x_NK; `out` if it was passed. There is no gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or stride is wrong, `out` overlaps with an argument, or a gradient is asked for.
    """
    op = "decode_linear"
    if not validate.is_unchecked():
        _check(op, x_NK, weight_MK, bias_M, out)
    if out is None:
        out = torch.empty((x_NK.shape[0], weight_MK.shape[0]), dtype=x_NK.dtype, device=x_NK.device)
    if out.numel():
        bias_M = None if bias_M is None else bias_M.detach()
        select(op, x_NK, weight_MK)(x_NK.detach(), weight_MK.detach(), bias_M, out)
    return out


def _check(op: str, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None, out: Tensor | None) -> None:
    validate.check_floating(op, "x_NK", x_NK, (None, None))
    operands: dict[str, tuple[Tensor, tuple[int | None, ...]]] = {"weight_MK": (weight_MK, (None, x_NK.shape[1]))}
    if bias_M is not None:
        operands["bias_M"] = (bias_M, (weight_MK.shape[0],))
    for name, (operand, shape) in operands.items():
        validate.check_floating(op, name, operand, shape, x_NK)
        if operand.dtype != x_NK.dtype:
            raise TypeError(f"{op}: {name} must be {x_NK.dtype} like x_NK, got {operand.dtype}")
    inputs = [x_NK, *(operand for operand, _ in operands.values())]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError(f"{op}: there is no gradient; call it under torch.no_grad()")
    if out is not None:
        validate.check_out(op, "out", out, (x_NK.shape[0], weight_MK.shape[0]), (x_NK,))
        validate.check_contiguous(op, "out", out)
        for name, x in zip(("x_NK", *operands), inputs, strict=True):
            validate.check_apart(op, "out", out, name, x)
