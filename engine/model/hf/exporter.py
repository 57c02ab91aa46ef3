"""A model's parameters under their Hugging Face names, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icegrt.model.architecture import Architecture
from icegrt.model.hf.loader import local_parameters

if TYPE_CHECKING:
    from icegrt.model.language_model import LanguageModel
from icegrt.model.hf.mapping import ParameterSpec, parameter_mapping, shard_slices


def separate(spec: ParameterSpec, shards: Tensor | Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
    """A Megatron tensor, whole or as all ranks' shards in order -> the tensors of Hugging Face that it is made of."""
    shards = [shards] if isinstance(shards, Tensor) else shards
    return [_source(spec, index, shards, architecture) for index in range(len(spec.sources))]


def _source(spec: ParameterSpec, index: int, shards: Sequence[Tensor], architecture: Architecture) -> Tensor:
    parts = [
        (shard_slice, shard)
        for rank, shard in enumerate(shards)
        for shard_slice in shard_slices(spec, architecture, rank, len(shards))
        if shard_slice.source == index
    ]
    if len(parts) == 1:  # it lies in one place
        shard_slice, shard = parts[0]
        return shard_slice.of(shard)
    whole = torch.empty(spec.shapes[index], dtype=shards[0].dtype, device=shards[0].device)
    for shard_slice, shard in parts:
        whole.narrow(shard_slice.dim, shard_slice.start, shard_slice.stop - shard_slice.start).copy_(
            shard_slice.of(shard)
        )
    return whole


@torch.no_grad()
def export_tensors(
    model: LanguageModel, dtype: torch.dtype, read: Callable[[nn.Parameter], Tensor] = lambda p: p
) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters (or what `read` finds on them) under their Hugging Face names, on the CPU, in `dtype`.

    One at a time. A collective: every rank iterates to the end, and rank 0 alone is given the tensors.
    """
    for spec, shards in _gathered(model, read):
        yield from exported(spec, shards, model.architecture, dtype)


def _gathered(
    model: LanguageModel, read: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[ParameterSpec, list[Tensor]]]:
    """On rank 0, every entry of the layout with all ranks' shards; the others of its model hand theirs over."""
    from megatron.core import parallel_state

    model.wait_for_param_gather()
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    held = {name: read(parameter).detach() for name, parameter in local_parameters(model).items()}
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(pipeline_group)
    if len(stages) == 1 and dist.get_world_size(tensor_group) == 1:
        for spec in parameter_mapping(model.architecture, model.head_kind):
            yield spec, [held[spec.name]]
        return
    shapes: list[Any] = [None] * len(stages)
    dist.all_gather_object(shapes, {n: (tuple(x.shape), x.dtype) for n, x in held.items()}, group=pipeline_group)
    receives = parallel_state.is_pipeline_first_stage()
    for spec in parameter_mapping(model.architecture, model.head_kind):
        stage = next(s for s in range(len(stages)) if spec.name in shapes[s])
        if dist.get_rank(pipeline_group) == stage:
            shard = held[spec.name].cpu().contiguous()
            if stage > 0:
                dist.send(shard, stages[0], group=pipeline_group)
        elif receives:
            shape, dtype = shapes[stage][spec.name]
            shard = torch.empty(shape, dtype=dtype)
            dist.recv(shard, stages[stage], group=pipeline_group)
        if receives:
            shards = _shards_on_rank_0(spec, shard, tensor_group)
            if shards is not None:
                yield spec, shards


def _shards_on_rank_0(spec: ParameterSpec, shard: Tensor, group: dist.ProcessGroup) -> list[Tensor] | None:
    ranks = dist.get_process_group_ranks(group)
    first = dist.get_rank() == ranks[0]
    if spec.partition == "whole" or len(ranks) == 1:
        return [shard] if first else None
    shards = [torch.empty_like(shard) for _ in ranks] if first else None
    dist.gather(shard, shards, dst=ranks[0], group=group)
    return shards


def exported(
    spec: ParameterSpec, shards: Sequence[Tensor], architecture: Architecture, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """One parameter, as the shards of all ranks in order, under its names in Hugging Face, on the CPU, in `dtype`.

    Rows that pad the vocabulary are left behind. A single tensor may be a view of its parameter.
    """
    for index, name in enumerate(spec.sources):
        yield name, _source(spec, index, shards, architecture).to("cpu", dtype)
