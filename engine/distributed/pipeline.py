"""What a role owes to the other ranks: gradients to data-parallel ones, results to the other pipeline stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.model.language_model import LanguageModel


def wrap(model: LanguageModel, *, overlap: bool | None = None, bucket_size: int | None = None) -> list:
    """Megatron's DDP around every chunk: fp32 gradients, reduce-scattered into the distributed optimizer's shares.

    overlap: the reduction with the backward pass, and gathering parameters with the next forward pass (None: on a GPU).
    bucket_size: parameters that travel together where they overlap (None: as many as Megatron thinks best).
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    overlap = next(model.parameters()).is_cuda if overlap is None else overlap
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_size,
    )
    # Only the first chunk is cut into buckets: the later ones' reductions hide behind the earlier ones' backward.
    ddps = [
        DistributedDataParallel(model.config, dataclasses.replace(config), chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    ]
    if overlap:
        syncs = [ddp.no_sync for ddp in ddps]
        model.config.no_sync_func = syncs if len(ddps) > 1 else syncs[0]
    return ddps


def settle(ddps: list) -> None:
    """Gather the parameters that the last optimizer step changed, where the next forward pass was to do so."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync(force_sync=True)


def true_everywhere(value: bool) -> bool:
    """Whether `value` is true on every rank."""
    flag = torch.tensor([int(value)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _pipeline() -> tuple[Any, int]:
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    return group, dist.get_process_group_ranks(group)[-1]


def vectors_from_last_stage(found: list[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
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


def objects_from_last_stage(found: list[Any]) -> list[Any]:
    """The last stage's statistics on every stage, on the CPU."""
    group, last = _pipeline()
    if dist.get_world_size(group) == 1:
        return found
    held = [_mapped(found, _lean)]
    dist.broadcast_object_list(held, src=last, group=group)
    return _mapped(held[0], _whole)


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A tensor of no dimension on its way: pickled as it is, it would weigh 400 bytes."""

    value: float
    dtype: torch.dtype


def _lean(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.cpu() if x.dim() else _Scalar(x.item(), x.dtype)


def _whole(x: Any) -> Any:
    return torch.tensor(x.value, dtype=x.dtype) if isinstance(x, _Scalar) else x


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(x, change) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, _Scalar):
        return type(value)(*(_mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)))
    return change(value)
