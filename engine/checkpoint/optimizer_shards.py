"""The optimizer state of a role in its checkpoint: every rank saves and loads its own shard.

Megatron 0.16: its resharding format gathers the state of all data-parallel ranks on each of them, 12 bytes of host
memory per parameter and rank, before one writes it. Formats without a gather do not reshard. We describe the shard of a
parameter as boxes of the parameter's entries. Keys and shapes in the checkpoint are those of Megatron's format, so any
other layout, and an older checkpoint, can be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_STATES = ("param", "exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Divide entries `start` to `stop` of a flattened tensor into boxes, in order.

    Args:
        shape: of the tensor, with at least one dimension.
        start, stop: at least one entry.

    Yields:
        Offsets and sizes of each box; its entries follow each other in the flattened tensor. There are at most three
        for a matrix: the rest of a row, whole rows, and the beginning of a row.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows, the last one excluded
    if first > last:  # within a row
        yield from _in_row(shape, last, start, stop)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    begin = index * math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], start - begin, stop - begin):
        yield (index, *offsets), (1, *sizes)


def sharded_states(optimizer: Any, sharded_model: Any) -> dict[int, dict[str, dict[int, Any]]]:
    """Return views of this rank's optimizer state as Megatron's ShardedTensors; a load may write to them.

    Args:
        optimizer: Megatron's distributed optimizer, with states.
        sharded_model: the state dict that Megatron saves of the model.

    Returns:
        The boxes of each state of each parameter that this rank updates.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    entries, _ = extract_sharded_tensors_and_factories(sharded_model)
    entry_of = {id(entry.data): entry for entry in nested_values(entries)}
    document: dict[int, dict[str, dict[int, Any]]] = {}
    for number, (parameter, span) in enumerate(_local_parameters(optimizer)):
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        pieces = _pieces(entry_of[id(parameter)])
        document[number] = {name: dict(enumerate(_tensors(name, states[name], span, pieces))) for name in _STATES}
    return document


@torch.no_grad()
def load_states(optimizer: Any, document: dict[int, dict[str, dict[int, Tensor]]]) -> None:
    """Copy loaded boxes to this rank's optimizer state, unless they were loaded into it.

    Args:
        optimizer: Megatron's distributed optimizer, with states.
        document: the loaded `sharded_states`.
    """
    for number, (parameter, _) in enumerate(_local_parameters(optimizer)):
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for name in _STATES:
            loaded = [box.flatten() for _, box in sorted(document[number][name].items())]
            targets = states[name].view(-1).split([box.numel() for box in loaded])
            for target, box in zip(targets, loaded, strict=True):
                if target.data_ptr() != box.data_ptr():
                    target.copy_(box)


def _local_parameters(optimizer: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parameters that this rank updates, with the range of entries."""
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _pieces(entry: Any) -> list[tuple[int, Any]]:
    """Return the ShardedTensors of a parameter, each with the entry of the parameter at which it begins.

    A factory divides a parameter: gate and up projections are one parameter, and two tensors of a checkpoint.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(entry, ShardedTensorFactory):
        return [(0, entry)]
    pieces = list(nested_values(entry.build()))
    assert all(piece.data.is_contiguous() for piece in pieces), entry.key
    return [(piece.data.storage_offset() - entry.data.storage_offset(), piece) for piece in pieces]


def _tensors(name: str, state: Tensor, span: Any, pieces: Sequence[tuple[int, Any]]) -> Iterator[Any]:
    """Yield the boxes of one state as ShardedTensors.

    Args:
        name: of the state.
        state: [span.size] fp32.
        span: the range of entries of the parameter.
        pieces: of the parameter.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    flat = state.detach().view(-1)
    for begin, piece in pieces:
        start, stop = max(span.start, begin), min(span.end, begin + math.prod(piece.local_shape))
        position = start - span.start
        for offsets, sizes in boxes(piece.local_shape, start - begin, stop - begin) if start < stop else ():
            prepended = piece.prepend_axis_num
            local = (*[1] * prepended, *sizes)
            inner = zip(piece.global_offset[prepended:], offsets, strict=True)
            count = math.prod(sizes)
            yield ShardedTensor(
                f"optimizer.state.{name}.{piece.key}",
                flat[position : position + count].view(local),
                state.dtype,
                local,
                piece.global_shape,
                (*piece.global_offset[:prepended], *(offset + within for offset, within in inner)),
                None,  # boxes are no regular grid
                # One rank of its data-parallel group has the shard.
                replica_id=(*piece.replica_id[:2], 0),
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )
            position += count
