"""Projections by torch's matrix product, which a GPU uses too."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_linear(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None, out: Tensor) -> None:
    """Write x @ weight.T + bias to `out`; see the public function."""
    if bias_M is None:
        torch.mm(x_NK, weight_MK.t(), out=out)
    else:
        torch.addmm(bias_M, x_NK, weight_MK.t(), out=out)
