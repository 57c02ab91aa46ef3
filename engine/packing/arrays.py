"""Convert token lists, arrays and tensors to flat numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

# One sequence's integers: a list, a numpy array or a tensor.
Integers = Sequence[int] | np.ndarray | Tensor


def integer(name: str, value: Any) -> int:
    """Return `value` as an int; raise ValueError unless it is an int64."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int64, got {value}")
    return int(value)


def int_array(name: str, row: Integers, kinds: str = "iu") -> np.ndarray:
    """Return a sequence of integers as an int64 array, without a copy if it is one already.

    Raises:
        ValueError: `row` has several dimensions, or its values are of none of the numpy `kinds`.
    """
    if isinstance(row, Tensor):
        if row.is_floating_point() or row.is_complex():
            raise ValueError(f"{name}: expected integers, got {row.dtype}")
        array = row.detach().cpu().numpy()
    else:
        try:
            array = np.asarray(row)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{name}: expected a sequence of integers, got {type(row).__name__} ({error})") from None
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {array.shape} from {type(row).__name__}")
    if array.size == 0 and not isinstance(row, (np.ndarray, Tensor)):
        array = array.astype(np.int64)  # numpy gives an empty list the dtype float64
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name}: expected int64 values, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def flatten(name: str, rows: Sequence[Integers], kinds: str = "iu") -> tuple[np.ndarray, np.ndarray]:
    """Return the values of ragged rows end to end, and N + 1 offsets, both int64. The values are a copy.

    Raises:
        ValueError: a row is no sequence of integers; the message names it.
    """
    try:
        rows = list(rows)
    except TypeError:
        raise ValueError(f"{name}: expected a sequence of token sequences, got {type(rows).__name__}") from None
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    if not rows:
        return np.zeros(0, dtype=np.int64), offsets
    if all(type(row) is list for row in rows):
        values = _int_array_or_none(list(chain.from_iterable(rows)), kinds)
        if values is not None:
            np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=offsets[1:])
            return values, offsets
    arrays = [int_array(f"{name}[{i}]", row, kinds) for i, row in enumerate(rows)]
    np.cumsum([array.size for array in arrays], out=offsets[1:])
    return np.concatenate(arrays), offsets


def _int_array_or_none(values: list, kinds: str) -> np.ndarray | None:
    """Convert all rows at once; return None if a value is invalid, which the row-by-row path then names."""
    try:
        array = np.array(values) if values else np.zeros(0, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        return None
    return array.astype(np.int64, copy=False) if array.ndim == 1 and array.dtype.kind in kinds else None
