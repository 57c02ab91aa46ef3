"""The local device steps of the kernels as operators of `torch.library`, each with a declared cost.

An operator is one launch. The caller allocates what it writes, so an operator returns nothing, and on the meta device
it does nothing: allocations are seen where they happen. Collectives, and the autograd functions around a step, stay
outside: a process group is no argument of an operator, and autograd has no formula for one that writes its arguments.

A call through `torch.library.Library` costs 3 microseconds more than a plain function, one through `custom_op` 80.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "icegrt"


@dataclass(frozen=True)
class Cost:
    """What one call of an operator takes on a device.

    Attributes:
        launches: Kernels that it launches.
        flops: Elementary operations on numbers; an exponential, a logarithm or a quotient counts as one.
        bytes_read: Bytes that it reads, each counted once, however often a cache returns it.
        bytes_written: Bytes that it writes, each counted once.
    """

    launches: int
    flops: int
    bytes_read: int
    bytes_written: int

    @classmethod
    def of_pass(
        cls, reads: Iterable[Tensor | None], writes: Iterable[Tensor | None], flops: int, launches: int = 1
    ) -> Cost:
        """Return the cost of one pass that reads and writes tensors once; None: an absent one."""
        return cls(launches, flops, sum(map(tensor_bytes, reads)), sum(map(tensor_bytes, writes)))


@dataclass(frozen=True)
class DeviceOperator:
    """An operator: its launch, and its cost as a function of the same arguments.

    Attributes:
        launch: Runs it.
        cost: Returns its cost from shapes, dtypes and numbers alone; reads no tensor.
    """

    launch: Callable[..., None]
    cost: Callable[..., Cost]


OPERATORS: dict[str, DeviceOperator] = {}
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_defined: set[str] = set()


def device_operator(schema: str, cost: Callable[..., Cost]) -> Callable[[Callable[..., None]], Any]:
    """Register a function that launches one kernel as an operator.

    Args:
        schema: Name and arguments in the language of `torch.library`, for example "scale(Tensor x, Tensor(a!) out)".
        cost: Returns the cost of a call from the operator's arguments.

    Returns:
        A decorator that returns the operator, to be called with the function's arguments by position. A second
        registration of a name replaces its launch and cost.
    """
    name = schema.partition("(")[0]

    def register(launch: Callable[..., None]) -> Any:
        OPERATORS[name] = DeviceOperator(launch, cost)
        if name not in _defined:
            _defined.add(name)
            _LIBRARY.define(f"{schema} -> ()")

            def run(*args: Any) -> None:
                OPERATORS[name].launch(*args)

            for device in ("CPU", "CUDA"):
                _LIBRARY.impl(name, run, device)
            _LIBRARY.impl(name, _allocate_nothing, "Meta")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def tensor_bytes(x: Tensor | None) -> int:
    """Return the bytes of a tensor's elements; 0 for None."""
    return 0 if x is None else x.numel() * x.element_size()


def _allocate_nothing(*args: Any) -> None:
    """Run an operator on the meta device: its outputs exist already, and hold no data."""
