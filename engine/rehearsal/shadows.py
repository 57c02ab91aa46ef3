"""Values of small integer tensors on the rehearsed device, so that the host reads what it would read from a GPU.

The meta device has no data. Lengths, offsets, row numbers and masks come from the host, and most are read back or
decide a shape. Each such tensor has a shadow on the host, and every operation on shadowed tensors is done on the
shadows too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 1 << 24  # elements
_ATTRIBUTE = "_rehearsed_values"


class _Unknown(Exception):
    """An argument has no known values."""


def values_of(x: Tensor) -> Tensor | None:
    """Return the values of a tensor on the rehearsed device; None if they are unknown."""
    return getattr(x, _ATTRIBUTE, None)


def set_values(x: Tensor, values: Tensor | None) -> None:
    """Set or forget the values of a tensor on the rehearsed device."""
    setattr(x, _ATTRIBUTE, values)


def holds_values(dtype: torch.dtype) -> bool:
    """Return whether tensors of a dtype may have values: integers, bool and bytes."""
    return not (dtype.is_floating_point or dtype.is_complex)


def follow(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]) -> None:
    """Repeat an operation on the values of its arguments, and attach the results to its outputs."""
    if not outputs or any(not holds_values(x.dtype) or x.numel() > LARGEST for x in outputs):
        return
    try:
        values = func(*_replaced(args), **_replaced_options(kwargs))
    except _Unknown:
        for x in outputs:
            if values_of(x) is not None:  # written in place with unknown values
                set_values(x, None)
        return
    results = values if isinstance(values, (list, tuple)) else [values]
    if func.__name__.startswith(("empty", "new_empty")):
        for result in results:
            result.zero_()
    for x, result in zip(outputs, results, strict=True):
        set_values(x, result)


def _replaced(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            return value
        values = values_of(value)
        if values is None:
            raise _Unknown
        return values
    if isinstance(value, (list, tuple)):
        return [_replaced(x) for x in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _replaced_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    options = {name: _replaced(value) for name, value in kwargs.items()}
    if "device" in options:
        options["device"] = torch.device("cpu")
    return options
