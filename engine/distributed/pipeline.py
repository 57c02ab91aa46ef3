"""Collectives of a role: agreement of all ranks, and broadcasts of results from the last pipeline stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_ranks_true(value: bool) -> bool:
    """Return whether `value` is true on every rank. Collective."""
    flag = torch.tensor([int(value)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _pipeline() -> tuple[Any, int]:
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    return group, dist.get_process_group_ranks(group)[-1]


def broadcast_from_last_stage(results: list[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
    """Return the last stage's results on every stage. Collective over the pipeline; three broadcasts in all.

    Args:
        results: on the last stage `count` tuples of one length, of fp32 vectors on the CPU; empty on other stages.
        count: number of tuples.
    """
    group, last = _pipeline()
    if dist.get_world_size(group) == 1:
        return results
    width = torch.tensor([len(results[0]) if results else 0])
    dist.broadcast(width, last, group=group)
    sizes = torch.zeros(count, int(width), dtype=torch.int64)
    if results:
        sizes = torch.tensor([[x.numel() for x in row] for row in results])
    dist.broadcast(sizes, last, group=group)
    flat = torch.cat([x for row in results for x in row]) if results else torch.empty(int(sizes.sum()))
    dist.broadcast(flat, last, group=group)
    parts = iter(flat.split(sizes.flatten().tolist()))
    return [tuple(next(parts) for _ in range(int(width))) for _ in range(count)]


def broadcast_objects_from_last_stage(objects: list[Any]) -> list[Any]:
    """Return the last stage's objects on every stage, with their tensors on the CPU. Collective over the pipeline."""
    group, last = _pipeline()
    if dist.get_world_size(group) == 1:
        return objects
    message = [_tree_map(objects, _to_wire)]
    dist.broadcast_object_list(message, src=last, group=group)
    return _tree_map(message[0], _from_wire)


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A scalar tensor as a message. A pickled tensor would take 400 bytes."""

    value: float
    dtype: torch.dtype


def _to_wire(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.cpu() if x.dim() else _Scalar(x.item(), x.dtype)


def _from_wire(x: Any) -> Any:
    return torch.tensor(x.value, dtype=x.dtype) if isinstance(x, _Scalar) else x


def _tree_map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_tree_map(x, function) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, _Scalar):
        return type(value)(*(_tree_map(getattr(value, f.name), function) for f in dataclasses.fields(value)))
    return function(value)
