"""The clipped value loss of PPO."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import ValueLoss
from .inputs import ValueStreams


def value_loss(
    value_A: Tensor,
    old_value_A: Tensor | None,
    return_A: Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor,
    mask_A: Tensor | None = None,
    weight_A: Tensor | None = None,
) -> ValueLoss:
    """Return the clipped value loss of PPO, summed over unmasked tokens and divided by `normalizer`.

    With value V, value when sampled V_old and return R:

        V_clip = clip(V, V_old - clip, V_old + clip)
        loss = sum weight * 0.5 * max((V - R)^2, (V_clip - R)^2) / normalizer

    Source: lm-human-preferences, the code of Ziegler et al. 2019 (arXiv:1909.08593). The result is
    differentiable in value_A only.

    Args:
        value_A: [A] floating, values under the critic that is trained.
        old_value_A: [A] floating, values when the tokens were scored. Required if clip is given.
        return_A: [A] floating, targets.
        clip: Number > 0, in units of the value. None: plain squared error.
        normalizer: Number > 0 or 0-dim tensor, for example the token count over all ranks.
        mask_A: [A], bool, integers, or floats of 0 and 1; 0 if the token does not count. What it holds then, NaN
            included, has no effect.
        weight_A: [A] floating, factor of each token's loss.

    Returns:
        ValueLoss: `loss`, 0-dim fp32 (fp64 if an input is), and `stats`, detached sums in fp64.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong, or a clip is given without old_value_A.
    """
    op = "value_loss"
    validate.check_floating(op, "value_A", value_A, (None,))
    shape = tuple(value_A.shape)
    validate.check_floating(op, "return_A", return_A, shape, value_A)
    if clip is not None:
        validate.check_plain_number(op, "clip", clip, low=0.0, above=True)
        if old_value_A is None:
            raise ValueError(f"{op}: old_value_A must be given when clip is {clip}; got None (clip=None needs none)")
    if old_value_A is not None:
        validate.check_floating(op, "old_value_A", old_value_A, shape, value_A)
        old_value_A = old_value_A.detach()
    validate.check_number(op, "normalizer", normalizer, low=0.0, above=True, like=value_A)
    validate.check_mask(op, "mask_A", mask_A, shape, value_A)
    if weight_A is not None:
        validate.check_floating(op, "weight_A", weight_A, shape, value_A)
    streams = ValueStreams(old_value_A, return_A.detach(), mask_A, weight_A)
    return select(op, value_A, old_value_A, return_A)(value_A, streams, clip, normalizer)
