"""The clipped value loss of PPO."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import ValueLoss


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
    """Sum over unmasked tokens of 0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), over normalizer.

    value_A, old_value_A, return_A: [A] floating; old_value_A may be None when clip is None (plain squared error).
    mask_A: [A], 0 where a token does not count; weight_A: [A] factors. normalizer: number > 0 or 0-dim tensor, the
    token count over all ranks. Returns ValueLoss(loss, stats), differentiable in value_A only. Source: recipe, after
    lm-human-preferences. Raises TypeError or ValueError naming the argument.
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
    run = select(op, value_A, old_value_A, return_A)
    return run(
        value_A, old_value_A, return_A.detach(), clip=clip, normalizer=normalizer, mask_A=mask_A, weight_A=weight_A
    )
