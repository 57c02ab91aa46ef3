"""Outputs of operations on the meta device, remembered by the shapes, strides and dtypes of their inputs.

torch computes the shapes of many operators in Python, up to a millisecond each. Layers are alike, so an operation is
run once, and every later one with such inputs allocates the same outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icegrt.rehearsal.operations import tensors_of

# Operators that change the shape, stride or storage of their argument.
_RESHAPING = frozenset(
    {
        "resize_",
        "resize_as_",
        "set_",
        "as_strided_",
        "squeeze_",
        "unsqueeze_",
        "t_",
        "transpose_",
        "swapdims_",
        "swapaxes_",
        "detach_",
        "rename_",
        "requires_grad_",
    }
)
_Meta = tuple[torch.Size, tuple[int, ...], torch.dtype]
_META = torch.device("meta")


class Outcomes:
    """Runs operators on the meta device, each kind of call once."""

    def __init__(self) -> None:
        self._kinds: dict[Any, str] = {}
        self._outputs: dict[Any, _Meta | list[_Meta]] = {}

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operator whose tensors are on the meta device."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "in place":
            return args[0]
        if kind == "in place, nothing returned":
            return None
        if kind == "out":
            return kwargs["out"]
        if kind == "other":
            return func(*args, **kwargs)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())))
            outputs = self._outputs.get(key)
        except TypeError:  # an argument that cannot be hashed
            return func(*args, **kwargs)
        if outputs is None:
            result = func(*args, **kwargs)
            described = _describe(result)
            if described is not None and not _shares_storage(result, args):
                self._outputs[key] = described
            return result
        if isinstance(outputs, list):
            return [torch.empty_strided(shape, stride, dtype=dtype, device=_META) for shape, stride, dtype in outputs]
        shape, stride, dtype = outputs
        return torch.empty_strided(shape, stride, dtype=dtype, device=_META)


def _kind(func: Any) -> str:
    """Return how an operator delivers: into its first argument, into `out`, into new tensors alone, or otherwise."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if name in _RESHAPING or func.namespace not in ("aten", "prims"):
        return "other"
    if len(written) == 1 and written[0].name == "out" and len(schema.returns) == 1:
        return "out"
    if name.endswith("_") and not name.startswith("__") and written and written[0] is schema.arguments[0]:
        return "other" if len(written) > 1 and schema.returns else _in_place(schema)
    is_new = not any(a.alias_info for a in (*schema.arguments, *schema.returns))
    return "new" if is_new and all("Tensor" in str(r.type) for r in schema.returns) else "other"


def _in_place(schema: Any) -> str:
    if not schema.returns:
        return "in place, nothing returned"
    return "in place" if len(schema.returns) == 1 else "other"


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type, value.dim() == 0
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    return type(value), value


def _describe(result: Any) -> _Meta | list[_Meta] | None:
    """Return what allocates the same outputs; None if they are not all new tensors of the meta device."""
    if isinstance(result, Tensor):
        return (result.shape, result.stride(), result.dtype) if result.is_meta else None
    if isinstance(result, (tuple, list)) and result and all(isinstance(x, Tensor) and x.is_meta for x in result):
        return [(x.shape, x.stride(), x.dtype) for x in result]
    return None


def _shares_storage(result: Any, args: Sequence[Any]) -> bool:
    """Return whether an output is a view of an input; the schema of `_unsafe_view` and its like does not show it."""
    inputs = {x.untyped_storage()._cdata for x in tensors_of(args, {})}
    return any(x.untyped_storage()._cdata in inputs for x in tensors_of((result,), {}))
