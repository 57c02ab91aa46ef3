"""What a role owes to the other ranks: gradients to data-parallel ones, results to the other pipeline stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_ranks_true(value: bool) -> bool:
    """Whether `value` is true on every rank."""
    flag = torch.tensor([int(value)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _pipeline() -> tuple[Any, int]:
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    return group, dist.get_process_group_ranks(group)[-1]


def broadcast_from_last_stage(found: list[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
    """The last stage's `count` tuples of fp32 vectors on every stage: three messages, however many there are."""
    group, last = _pipeline()
    if dist.get_world_size(group) == 1:
        return found
    width = torch.tensor([len(found[0]) if found else 0])
    dist.broadcast(width, last, group=group)
    sizes = torch.zeros(count, int(width), dtype=torch.int64)
    if found:
        sizes = torch.tensor([[x.numel() for x in row] for row in found])
    dist.broadcast(sizes, last, group=group)
    flat = torch.cat([x for row in found for x in row]) if found else torch.empty(int(sizes.sum()))
    dist.broadcast(flat, last, group=group)
    parts = iter(flat.split(sizes.flatten().tolist()))
    return [tuple(next(parts) for _ in range(int(width))) for _ in range(count)]


def broadcast_objects_from_last_stage(found: list[Any]) -> list[Any]:
    """The last stage's statistics on every stage, on the CPU."""
    group, last = _pipeline()
    if dist.get_world_size(group) == 1:
        return found
    held = [_tree_map(found, _to_wire)]
    dist.broadcast_object_list(held, src=last, group=group)
    return _tree_map(held[0], _from_wire)


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A tensor of no dimension on its way: pickled as it is, it would weigh 400 bytes."""

    value: float
    dtype: torch.dtype


def _to_wire(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.cpu() if x.dim() else _Scalar(x.item(), x.dtype)


def _from_wire(x: Any) -> Any:
    return torch.tensor(x.value, dtype=x.dtype) if isinstance(x, _Scalar) else x


def _tree_map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_tree_map(x, change) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, _Scalar):
        return type(value)(*(_tree_map(getattr(value, f.name), change) for f in dataclasses.fields(value)))
    return change(value)
