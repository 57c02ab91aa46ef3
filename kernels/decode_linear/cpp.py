"""Projections on CPU threads (csrc/linear_rows.hpp), which read the weight in place.

A processor with instructions for bf16 multiplies more than a few bf16 rows faster through torch (oneDNN). Without them
torch emulates such a product, many times slower.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, hold
from ..dispatch import log_launch
from . import reference

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64", torch.float16: "float16"}
# Rows of bf16 from which on torch is faster, with its instructions: the weight is then multiplied, not only read.
_MANY_ROWS = 8


def decode_linear(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None, out: Tensor) -> None:
    """Write x @ weight.T + bias to `out`; see the public function."""
    if x_NK.dtype == torch.bfloat16 and x_NK.shape[0] >= _MANY_ROWS and _multiplies_bfloat16():
        reference.decode_linear(x_NK, weight_MK, bias_M, out)
    else:
        linear_rows(x_NK, weight_MK, bias_M, out)


def linear_rows(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None, out: Tensor) -> None:
    """Write x @ weight.T + bias to `out`, which has the operands' dtype or the one that it is summed in."""
    if x_NK.stride(1) != 1 and x_NK.shape[1] > 1:
        x_NK = x_NK.contiguous()
    if weight_MK.stride(1) != 1 and weight_MK.shape[1] > 1:
        weight_MK = weight_MK.contiguous()
    log_launch("decode_linear", "cpp")
    _C.linear_rows(
        _DTYPES[x_NK.dtype],
        out.dtype != x_NK.dtype,
        (x_NK.data_ptr(), weight_MK.data_ptr(), address(bias_M), out.data_ptr()),
        (x_NK.shape[0], *weight_MK.shape, x_NK.stride(0), weight_MK.stride(0), out.stride(0)),
        torch.get_num_threads(),
    )
    hold(x_NK, weight_MK, bias_M, out)


@cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())
