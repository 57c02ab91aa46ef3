"""Copy many small tensors to a device at once."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: the widest load of a kernel


def copy_to_device(
    tensors: Mapping[str, Tensor], device: torch.device, *, non_blocking: bool = False
) -> dict[str, Tensor]:
    """Return the tensors on `device`; those of the host share one buffer and one copy.

    Tensors that are on the device already are returned as they are.

    Args:
        tensors: by name, of any dtype and shape.
        device: where to.
        non_blocking: the host does not wait for the copy. With CUDA the buffer is then pinned.
    """
    if device.type == "cpu":
        return {name: x.to(device) for name, x in tensors.items()}
    host = {name: x for name, x in tensors.items() if x.device.type == "cpu"}
    if not host:
        return dict(tensors)
    buffer, starts = join(list(host.values()), pin=non_blocking and torch.cuda.is_available())
    on_device = split(buffer.to(device, non_blocking=non_blocking), list(host.values()), starts)
    return {**tensors, **dict(zip(host, on_device, strict=True))}


def join(tensors: list[Tensor], *, pin: bool = False) -> tuple[Tensor, list[int]]:
    """Return the bytes of host tensors in one uint8 buffer, and the byte at which each starts."""
    sizes = [-(-x.nbytes // _ALIGNMENT) * _ALIGNMENT for x in tensors]
    *starts, total = accumulate(sizes, initial=0)
    buffer = torch.empty(total, dtype=torch.uint8, pin_memory=pin)
    for part, x in zip(split(buffer, tensors, starts), tensors, strict=True):
        part.copy_(x)
    return buffer, starts


def split(buffer: Tensor, like: list[Tensor], starts: list[int]) -> list[Tensor]:
    """Return views of a buffer that `join` filled, with the dtypes and shapes of `like`."""
    return [buffer[start : start + x.nbytes].view(x.dtype).view(x.shape) for x, start in zip(like, starts, strict=True)]
