"""Gather a model's parameters from all ranks, under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icegrt.kernels.common.collectives import communication_device
from icegrt.model.architecture import Architecture
from icegrt.model.hf.mapping import ParameterSpec, shard_slices

if TYPE_CHECKING:
    from icegrt.model.pipeline_model import PipelineModel


@torch.no_grad()
def export_tensors(
    model: PipelineModel,
    dtype: torch.dtype,
    read: Callable[[nn.Parameter], Tensor] = lambda p: p,
    specs: Sequence[ParameterSpec] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's parameters under their Hugging Face names, one at a time. Collective.

    Every rank must iterate to the end. Rank 0 alone receives tensors.

    Args:
        model: the stages of this rank.
        dtype: of the tensors.
        read: returns the tensor to export for a parameter, for example its gradient; default: the parameter.
        specs: what to export; None: all parameters of the model.

    Yields:
        Name and tensor on the CPU, in the order of the model's `parameter_mapping()`.
    """
    specs = list(model.parameter_mapping()) if specs is None else specs
    for spec, shards in _gathered(model, read, specs):
        yield from exported(spec, shards, model.architecture, dtype)


def _gathered(
    model: PipelineModel, read: Callable[[nn.Parameter], Tensor], specs: Sequence[ParameterSpec]
) -> Iterator[tuple[ParameterSpec, list[Tensor]]]:
    """Yield every parameter with the shards of all ranks, on rank 0; the other ranks of its model send shards."""
    from megatron.core import parallel_state

    # 1. One copy of the model is enough: that of the first data-parallel rank.
    model.wait_for_param_gather()
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    local_tensors = {name: read(parameter).detach() for name, parameter in model.named_parameters()}
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(pipeline_group)
    if len(stages) == 1 and dist.get_world_size(tensor_group) == 1:
        for spec in specs:
            yield spec, [local_tensors[spec.name]]
        return
    # 2. The rank that holds a parameter sends it to the first rank of its pipeline, on the device of the group.
    device = communication_device(pipeline_group, torch.device("cpu"))
    shapes: list[Any] = [None] * len(stages)
    local_shapes = {name: (tuple(x.shape), x.dtype) for name, x in local_tensors.items()}
    dist.all_gather_object(shapes, local_shapes, group=pipeline_group)
    is_first = parallel_state.is_pipeline_first_stage()
    for spec in specs:
        stage = next(s for s in range(len(stages)) if spec.name in shapes[s])
        if dist.get_rank(pipeline_group) == stage:
            shard = local_tensors[spec.name].to(device).contiguous()
            if stage > 0:
                dist.send(shard, stages[0], group=pipeline_group)
        elif is_first:
            shape, dtype = shapes[stage][spec.name]
            shard = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(shard, stages[stage], group=pipeline_group)
        # 3. Rank 0 gathers the shards of the first stage.
        if is_first:
            shards = _gather_on_rank_0(spec, shard, tensor_group)
            if shards is not None:
                yield spec, shards


def _gather_on_rank_0(spec: ParameterSpec, shard: Tensor, group: dist.ProcessGroup) -> list[Tensor] | None:
    ranks = dist.get_process_group_ranks(group)
    is_first = dist.get_rank() == ranks[0]
    if spec.is_replicated or len(ranks) == 1:
        return [shard] if is_first else None
    shards = [torch.empty_like(shard) for _ in ranks] if is_first else None
    dist.gather(shard, shards, dst=ranks[0], group=group)
    return shards


def exported(
    spec: ParameterSpec, shards: Sequence[Tensor], architecture: Architecture, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of one parameter, on the CPU.

    Rows that pad the vocabulary are dropped. A tensor may be a view of its parameter.

    Args:
        spec: the parameter's entry in `parameter_mapping()`.
        shards: the shards of all tensor-parallel ranks, in order.
        architecture: sizes of the model.
        dtype: of the tensors.
    """
    for index, name in enumerate(spec.sources):
        yield name, _hf_tensor(spec, index, shards, architecture).to("cpu", dtype)


def _hf_tensor(spec: ParameterSpec, index: int, shards: Sequence[Tensor], architecture: Architecture) -> Tensor:
    slices = [
        (shard_slice, shard)
        for rank, shard in enumerate(shards)
        for shard_slice in shard_slices(spec, architecture, rank, len(shards))
        if shard_slice.source == index
    ]
    if len(slices) == 1:  # contiguous in one shard: a view
        shard_slice, shard = slices[0]
        return shard_slice.of(shard)
    tensor = torch.empty(spec.shapes[index], dtype=shards[0].dtype, device=shards[0].device)
    for shard_slice, shard in slices:
        length = shard_slice.stop - shard_slice.start
        tensor.narrow(shard_slice.dim, shard_slice.start, length).copy_(shard_slice.of(shard))
    return tensor
