"""Safetensors written tensor by tensor: shapes are known beforehand, so nothing is gathered in memory.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, a JSON header with dtype,
shape and byte range of every tensor, then the bytes, little-endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_bytes: int,
) -> None:
    """Write `model.safetensors` into `folder`, or several files of at most `max_bytes` and their index.

    `tensors` come in the order of `shapes`, on the CPU, in `dtype` (float32 or bfloat16). A tensor larger than
    `max_bytes` has a file of its own.
    """
    bunches = list(_bunches(shapes, dtype.itemsize, max_bytes))
    names = [f"model-{i + 1:05d}-of-{len(bunches):05d}.safetensors" for i in range(len(bunches))]
    if len(bunches) == 1:
        names = ["model.safetensors"]
    given = iter(tensors)
    for name, bunch in zip(names, bunches, strict=True):
        _write_file(folder / name, given, {tensor: shapes[tensor] for tensor in bunch}, dtype)
    assert next(given, None) is None, "more tensors than shapes"
    if len(bunches) > 1:
        total = sum(_bytes(shape, dtype.itemsize) for shape in shapes.values())
        weight_map = {tensor: name for name, bunch in zip(names, bunches, strict=True) for tensor in bunch}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _bunches(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    bunch: list[str] = []
    total = 0
    for name, shape in shapes.items():
        size = _bytes(shape, itemsize)
        if bunch and total + size > max_bytes:
            yield bunch
            bunch, total = [], 0
        bunch.append(name)
        total += size
    yield bunch


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    return math.prod(shape) * itemsize


def _write_file(
    path: Path, given: Iterator[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(shape, dtype.itemsize)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for expected, shape in shapes.items():
            name, tensor = next(given)
            assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype), f"{name} for {expected}"
            file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()))
            del tensor  # before the next one is made
