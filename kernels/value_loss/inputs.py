"""Inputs of the value loss by token, beside the value itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ValueStreams:
    """Inputs by token [A] that the value loss treats as constants. A: actions of the packed stream."""

    old_value_A: Tensor | None  # needed only with a clip
    return_A: Tensor
    mask_A: Tensor | None  # 0: the token does not count; None: all count
    weight_A: Tensor | None  # None: all 1
