"""What an operation of PyTorch takes on a GPU, from its arguments alone: launches, matrix-product FLOPs, bytes.

An operator launches one kernel, but for those of the tables here. A table entry is the number of kernels that
PyTorch's CUDA implementation launches for it, without the copies of sizes that only some inputs need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Operators that allocate or describe memory and launch nothing.
FREE = frozenset(
    {
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "detach_",
        "alias",
        "lift_fresh",
        "_unsafe_view",
        "_reshape_alias",
        "set_",
        "resize_",
        "is_pinned",
        "is_same_size",
        "record_stream",
        "_local_scalar_dense",
        # Of a number that is put into a tensor: CUDA keeps it on the host.
        "scalar_tensor",
    }
)
# Sorts and scans are several kernels each: a histogram or a partial scan, and passes over the keys.
SEVERAL = {
    "sort": 4,
    "argsort": 4,
    "topk": 3,
    "cumsum": 2,
    "nonzero": 4,
    "masked_select": 5,
    "masked_scatter_": 3,
    "masked_scatter": 4,
    "_unique2": 6,
    "embedding_dense_backward": 6,
    "repeat_interleave": 2,
    "index_select_backward": 2,
    "_softmax_backward_data": 1,
    "linalg_vector_norm": 1,
}
# Multi-tensor kernels: chunks of 65,536 elements, at most 320 blocks a launch, and so many tensors for each number of
# lists (ATen's multi_tensor_apply).
_FOREACH_CHUNK, _FOREACH_BLOCKS = 65536, 320
_FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
# Operators that read rows of a table, not all of it.
_GATHERS = frozenset({"embedding", "index", "index_select", "gather", "index_put_", "index_copy_", "index_add_"})


def tensor_bytes(x: Tensor) -> int:
    """Return the bytes that reading a tensor moves: an expanded one is no larger than its storage."""
    size = x.numel() * x.element_size()
    return min(size, x.untyped_storage().nbytes()) if size else 0


def launches(name: str, args: Sequence[Any]) -> int:
    """Return the kernels that one call of an operator launches."""
    if name in FREE:
        return 0
    if name.startswith(("_foreach_", "_fused_adam")):
        return _foreach_launches(args)
    return SEVERAL.get(name, 1)


def _foreach_launches(args: Sequence[Any]) -> int:
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    if not lists:
        return 0
    tensors, blocks, count = _FOREACH_TENSORS[min(len(lists), 5)], 0, 0
    total = 0
    for x in lists[0]:
        chunks = max(1, math.ceil(x.numel() / _FOREACH_CHUNK))
        count += 1
        blocks += chunks
        while blocks >= _FOREACH_BLOCKS:
            total, blocks, count = total + 1, blocks - _FOREACH_BLOCKS, 0
        if count == tensors:
            total, blocks, count = total + 1, 0, 0
    return total + (blocks > 0)


def product_flops(name: str, args: Sequence[Any]) -> int:
    """Return the FLOPs of a matrix product, 2 m n k; 0 for other operators."""
    if name in ("mm", "bmm"):
        a, b = args[0], args[1]
    elif name in ("addmm", "baddbmm", "addmm_", "baddbmm_"):
        a, b = args[1], args[2]
    else:
        return 0
    return 2 * a.numel() * b.shape[-1]


def product_dtype(name: str, args: Sequence[Any]) -> torch.dtype:
    """Return the dtype of a matrix product's operands."""
    return (args[0] if name in ("mm", "bmm") else args[1]).dtype


def traffic(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], launched: int) -> tuple[int, int]:
    """Return the bytes that an operator reads and writes in device memory."""
    if not launched:
        return 0, 0
    if name in ("zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros"):
        return 0, sum(map(tensor_bytes, outputs))
    if name == "copy_" and len(inputs) == 2:
        return tensor_bytes(inputs[1]), tensor_bytes(inputs[0])
    if name in _GATHERS:
        # The rows that are moved: those of the output, or of the values that are put.
        rows = outputs if not name.endswith("_") else inputs[-1:]
        moved = sum(map(tensor_bytes, rows))
        return moved + sum(tensor_bytes(x) for x in inputs[1:] if not x.is_floating_point()), moved
    return sum(map(tensor_bytes, inputs)), sum(map(tensor_bytes, outputs))
