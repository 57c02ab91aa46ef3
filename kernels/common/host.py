"""Tensors as the C++ operations of the trunk take them: an address, a dtype by name, contiguous memory.

These operations run thousands of times per iteration on little data. An address costs a tenth of a numpy array, which
has no bf16 either; what it points to is checked here, in the one place that calls the extension.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def dtype_name(*tensors: Tensor | None) -> str | None:
    """Return the extension's name of the tensors' dtype; None if they differ or C++ does not have it (fp16)."""
    first, *others = (x.dtype for x in tensors if x is not None)
    return _NAMES.get(first) if all(dtype == first for dtype in others) else None


def address(x: Tensor | None) -> int:
    """Return the address of a tensor's first element; 0 for None."""
    return 0 if x is None else x.data_ptr()


def hold(*tensors: Tensor | None) -> None:
    """Keep tensors alive up to this line, which follows the call of the extension that has their addresses.

    torch.compile breaks its graph at that call and keeps only what is read later: a copy that is made for the call
    would be freed before it, although a local variable names it.
    """
