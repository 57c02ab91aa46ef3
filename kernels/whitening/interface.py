"""Moments of a masked tensor, and whitening by moments that may span ranks and micro-batches."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from .. import validate
from ..dispatch import select
from ..stats import Moments


def masked_moments(x: Tensor, mask: Tensor | None = None, group: dist.ProcessGroup | None = None) -> Moments:
    """Return count, mean and sum of squared deviations of the unmasked entries of x.

        mean = sum x / count
        m2 = sum (x - mean)^2

    Ranks are merged by the rule of Chan, Golub and LeVeque 1979 ("Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances").

    Args:
        x: Floating, any shape.
        mask: The shape of x, bool, integers, or floats of 0 and 1; 0 if the entry does not count. What it holds then,
            NaN included, has no effect. None: all entries count.
        group: Process group to merge over. A collective: ranks without entries must call too. None: this rank only.

    Returns:
        Moments of 0-dim fp64 tensors on the device of x.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: The shapes or devices differ.
    """
    op = "masked_moments"
    validate.check_floating(op, "x", x, (None,) * getattr(x, "ndim", 1))
    validate.check_mask(op, "mask", mask, tuple(x.shape), x)
    return select(op, x)(x.detach(), mask, group)


def whiten(x: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8, correction: int = 0) -> Tensor:
    """Return x whitened by the variance of `moments`.

        white = (x - mean) * rsqrt(m2 / (count - correction) + eps)

    Without `shift_mean` the mean is added again. Source: lm-human-preferences (Ziegler et al. 2019), which shifts
    advantages and does not shift rewards. The result is differentiable in x; the moments are constants.

    Args:
        x: Floating, any shape.
        moments: Moments on the device of x, of any set of entries.
        shift_mean: Whether the result lacks the mean.
        eps: Number >= 0, added to the variance.
        correction: 0 for the population variance, 1 for Bessel's. A single entry has a variance of 0 with both.

    Returns:
        Tensor of the shape of x, fp32 (fp64 if x is).

    Raises:
        TypeError: x is not a floating tensor, or moments are not Moments.
        ValueError: eps < 0, correction is neither 0 nor 1, or the moments are on another device.
    """
    op = "whiten"
    validate.check_floating(op, "x", x, (None,) * getattr(x, "ndim", 1))
    if moments is None:
        raise TypeError(f"{op}: moments must be Moments, got None")
    validate.check_moments(op, moments, x)
    validate.check_plain_number(op, "eps", eps, low=0.0)
    if correction not in (0, 1):
        raise ValueError(f"{op}: correction must be 0 or 1, got {correction!r}")
    if correction:
        # Backends divide m2 by the count, at least 1, and read the count for nothing else.
        moments = replace(moments, count=moments.count - correction)
    return select(op, x)(x, moments, shift_mean=shift_mean, eps=eps)
