"""Write safetensors files tensor by tensor. Shapes are known in advance, so one tensor is in memory at a time.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, a JSON header with dtype,
shape and byte range of every tensor, then the bytes, little-endian.
"""

from __future__ import annotations

import ctypes
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
    """Write `model.safetensors` into `folder`, or several files and their index.

    Args:
        folder: an existing folder.
        tensors: names and tensors in the order of `shapes`, on the CPU, in `dtype`.
        shapes: shapes by name.
        dtype: float32 or bfloat16.
        max_bytes: largest size of a file; a larger tensor gets a file of its own.
    """
    shards = list(_shards(shapes, dtype.itemsize, max_bytes))
    file_names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        file_names = ["model.safetensors"]
    iterator = iter(tensors)
    for file_name, names in zip(file_names, shards, strict=True):
        write_file(folder / file_name, iterator, {name: shapes[name] for name in names}, dtype)
    assert next(iterator, None) is None, "more tensors than shapes"
    if len(shards) > 1:
        total = sum(_bytes(shape, dtype.itemsize) for shape in shapes.values())
        weight_map = {name: file for file, names in zip(file_names, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, shape in shapes.items():
        size = _bytes(shape, itemsize)
        if names and total + size > max_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    return math.prod(shape) * itemsize


def write_file(
    path: Path,
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file.

    Args:
        path: of the file.
        tensors: names and tensors in the order of `shapes`, on the CPU, in `dtype`.
        shapes: shapes by name.
        dtype: float32 or bfloat16.
        metadata: texts for the header.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(shape, dtype.itemsize)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the first tensor
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for expected, shape in shapes.items():
            name, tensor = next(tensors)
            assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype), f"{name} for {expected}"
            tensor = tensor.contiguous()
            # `numpy()` would mark the storage as not resizable, and it may be that of a role that is offloaded.
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            del tensor  # frees its memory before the iterator allocates the next one
