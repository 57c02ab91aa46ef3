"""Moments of a masked tensor, and whitening by moments that may span ranks and micro-batches."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import Moments


def masked_moments(x: Tensor, mask: Tensor | None = None, group=None) -> Moments:
    """Count, mean and M2 of the entries of x where mask is nonzero (None: all), as 0-dim fp64 tensors.

    x: floating, any shape; mask: the shape of x. What x holds where masked, NaN included, has no effect. With `group`
    the moments are those over all its ranks (a collective that ranks without entries must join).
    Raises ValueError for shapes that differ, TypeError for a dtype that is not floating.
    """
    op = "masked_moments"
    validate.check_floating(op, "x", x, (None,) * getattr(x, "ndim", 1))
    validate.check_mask(op, "mask", mask, tuple(x.shape), x)
    return select(op, x)(x.detach(), mask, group)


def whiten(x: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) * rsqrt(variance + eps) with the population variance of `moments`; plus the mean if not shift_mean.

    x: floating, any shape. Returns fp32 (fp64 for fp64 x). Shift advantages; do not shift rewards.
    The gradient is that by x alone. Raises TypeError for anything but floating x and Moments, ValueError for eps < 0
    and for moments on another device.
    """
    op = "whiten"
    validate.check_floating(op, "x", x, (None,) * getattr(x, "ndim", 1))
    if moments is None:
        raise TypeError(f"{op}: moments must be Moments, got None")
    validate.check_moments(op, moments, x)
    validate.check_plain_number(op, "eps", eps, low=0.0)
    return select(op, x)(x, moments, shift_mean=shift_mean, eps=eps)
