"""Logits of a head in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def lm_logits(hidden_NH: Tensor, weight_VH: Tensor, out: Tensor) -> None:
    """Write hidden @ weight.T to `out`; see the public function."""
    torch.mm(hidden_NH.to(out.dtype), weight_VH.to(out.dtype).t(), out=out)
