"""Logits for sampling: the product of hidden states and the head's weight, accumulated and returned in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..dispatch import select

# Legend: N, rows; H, hidden size; V, rows of the weight: the vocabulary, or this rank's slice of it.


def lm_logits(hidden_NH: Tensor, weight_VH: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return hidden @ weight.T in fp32, without an fp32 copy of the weight.

    Sums are in fp32 (fp64 if an argument is fp64), whatever the dtypes of the arguments are: logits rounded to bf16 are
    off by up to 7e-2.

    Args:
        hidden_NH: [N, H] floating.
        weight_VH: [V, H] floating.
        out: [N, V] fp32 (fp64), rows contiguous, written in place; None: it is allocated.

    Returns:
        [N, V] fp32, or fp64 if an argument is fp64; `out` if it was passed. There is no gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or stride is wrong, `out` overlaps with an argument, or a gradient is asked for.
    """
    op = "lm_logits"
    validate.check_floating(op, "hidden_NH", hidden_NH, (None, None))
    validate.check_floating(op, "weight_VH", weight_VH, (None, hidden_NH.shape[1]), hidden_NH)
    if torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad):
        raise ValueError(f"{op}: there is no gradient; call it under torch.no_grad()")
    shape, dtype = (hidden_NH.shape[0], weight_VH.shape[0]), validate.wide_dtype(hidden_NH, weight_VH)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=hidden_NH.device)
    else:
        validate.check_floating(op, "out", out, shape, hidden_NH)
        if out.dtype != dtype:
            raise TypeError(f"{op}: out must be {dtype}, got {out.dtype}")
        if out.requires_grad or (out.stride(1) != 1 and shape[1] > 1):
            raise ValueError(f"{op}: out must have contiguous rows and no gradient, got strides {out.stride()}")
        validate.check_apart(op, "out", out, "hidden_NH", hidden_NH)
        validate.check_apart(op, "out", out, "weight_VH", weight_VH)
    if out.numel():
        select(op, hidden_NH, weight_VH)(hidden_NH.detach(), weight_VH.detach(), out)
    return out
