"""Logits of a head on CPU threads (csrc/linear_rows.hpp), from operands of one dtype; the weight is read in place."""

from __future__ import annotations

from torch import Tensor

from ..decode_linear.cpp import linear_rows
from . import chunked


def lm_logits(hidden_NH: Tensor, weight_VH: Tensor, out: Tensor) -> None:
    """Write hidden @ weight.T to `out`; see the public function."""
    if hidden_NH.dtype == weight_VH.dtype:
        linear_rows(hidden_NH, weight_VH, None, out)
    else:
        chunked.lm_logits(hidden_NH, weight_VH, out)
