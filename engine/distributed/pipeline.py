"""Collectives of a role: agreement of all ranks, and results of the last pipeline stage for all stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.kernels.common.collectives import communication_device


def all_ranks_true(value: bool | Tensor) -> bool:
    """Return whether `value`, a bool or a 0-dim tensor, is true on every rank. Collective; the host waits once."""
    flag = torch.as_tensor(value).int()
    flag = flag.to(communication_device(None, flag.device))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _pipeline() -> tuple[Any, int]:
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    return group, dist.get_process_group_ranks(group)[-1]


def broadcast_from_last_stage(
    results: list[tuple[Tensor, ...]], sizes: Sequence[tuple[int, ...]], device: torch.device
) -> list[tuple[Tensor, ...]]:
    """Return the last stage's results on every stage. Collective over the pipeline; one broadcast.

    Args:
        results: on the last stage a tuple of fp32 vectors for each of `sizes`; empty on other stages.
        sizes: the number of entries of every vector.
        device: of the results.
    """
    group, last = _pipeline()
    if dist.get_world_size(group) == 1:
        return results
    counts = [size for row in sizes for size in row]
    flat = torch.cat([x for row in results for x in row]) if results else torch.empty(sum(counts), device=device)
    dist.broadcast(flat, last, group=group)
    parts = iter(flat.split(counts))
    return [tuple(next(parts) for _ in row) for row in sizes]


def fetch_from_last_stage(objects: Any) -> Any:
    """Return the last stage's objects on every stage, with their tensors on the host. Collective over the pipeline.

    The host waits for the device once, and the pipeline has one broadcast.
    """
    group, last = _pipeline()
    objects = fetch(objects)
    if dist.get_world_size(group) == 1:
        return objects
    message = [tree_map(objects, _to_wire)]
    dist.broadcast_object_list(message, src=last, group=group)
    return tree_map(message[0], _from_wire)


def fetch(objects: Any) -> Any:
    """Return objects with copies of their tensors on the host, which waits for the device once.

    Args:
        objects: lists, tuples, dicts and dataclasses, nested, of numbers and tensors. Integers are below 2^53.
    """
    tensors: list[Tensor] = []

    def find(x: Any) -> Any:
        if isinstance(x, Tensor) and x.device.type != "cpu":
            tensors.append(x)
        return x

    tree_map(objects, find)
    if not tensors:
        return objects
    # fp64 holds all narrower numbers, so one vector carries tensors of every dtype.
    flat = torch.cat([x.detach().flatten().double() for x in tensors]).cpu()
    parts = iter(flat.split([x.numel() for x in tensors]))

    def take(x: Any) -> Any:
        is_remote = isinstance(x, Tensor) and x.device.type != "cpu"
        return next(parts).to(x.dtype).view(x.shape) if is_remote else x

    return tree_map(objects, take)


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A scalar tensor as a message. A pickled tensor would take 400 bytes."""

    value: float
    dtype: torch.dtype


def _to_wire(x: Any) -> Any:
    return _Scalar(x.item(), x.dtype) if isinstance(x, Tensor) and not x.dim() else x


def _from_wire(x: Any) -> Any:
    return torch.tensor(x.value, dtype=x.dtype) if isinstance(x, _Scalar) else x


def tree_map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return `value` with `function` applied to the leaves of its lists, tuples, dicts and dataclasses, in order."""
    if isinstance(value, (list, tuple)):
        return type(value)(tree_map(x, function) for x in value)
    if isinstance(value, dict):
        return {key: tree_map(x, function) for key, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, (_Scalar, type)):
        return type(value)(*(tree_map(getattr(value, f.name), function) for f in dataclasses.fields(value)))
    return function(value)
