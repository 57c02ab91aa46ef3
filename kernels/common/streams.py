"""Optional inputs of operations over token streams: masks as bytes, and coefficients that may switch a term off."""

from __future__ import annotations

import torch
from torch import Tensor

# Legend: A, actions of the packed stream.


def mask_bytes(mask_A: Tensor) -> Tensor:
    """Return a mask as kernels read it: contiguous uint8, one byte per token, 0 where masked."""
    # A bool tensor already holds one byte per entry, so its view costs no copy.
    return (mask_A if mask_A.dtype == torch.bool else mask_A != 0).contiguous().view(torch.uint8)


def may_be_nonzero(coefficient: float | Tensor) -> bool:
    """Return False only for the Python number 0. A tensor counts as nonzero: reading it would synchronise a device."""
    return isinstance(coefficient, Tensor) or coefficient != 0
