"""Collectives of a rehearsal: counted by kind and group, and done at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.rehearsal.counts import Transfer
from icegrt.rehearsal.sites import current_site

if TYPE_CHECKING:
    from icegrt.rehearsal.watcher import Watcher


class DeviceMismatch(RuntimeError):
    """An operation got tensors of the host and of the device, which CUDA refuses."""


_NAMES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "gather_": "gather",
    "scatter_": "scatter",
    "reduce_": "reduce",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
    "barrier": "barrier",
}
_NO_META_KERNEL = ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_")


def run(watcher: Watcher, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Count a collective, and return its result. Raises if a tensor is not where the group communicates."""
    name = func._schema.name.partition("::")[2]
    boxed: Any = next(x for x in args if isinstance(x, torch.ScriptObject))
    group: Any = dist.ProcessGroup.unbox(boxed)
    outputs, inputs = _operands(name, args)
    for x in (*outputs, *inputs):
        if x.device.type not in {device.type for device in group._device_types}:
            raise DeviceMismatch(
                f"{current_site()}: {_NAMES.get(name, name)} of a host tensor {tuple(x.shape)} in a group of NCCL, "
                "which has no host side"
            )
    # The larger side: what a rank ends or starts with.
    size = max(sum(map(_size, outputs)), sum(map(_size, inputs)))
    op = _NAMES.get(name, name)
    watcher.counts.transfers[Transfer(op, *describe_group(group))].add(size)
    source = args[2] if op == "receive" else -1
    watcher.note_received(outputs, inputs, op, source)
    if name in _NO_META_KERNEL and any(x.is_meta for x in outputs):
        return torch._C._distributed_c10d.FakeWork().boxed()
    return func(*args, **kwargs)


def _operands(name: str, args: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return (outputs, inputs) of a collective."""

    def flat(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        return [x for part in value for x in flat(part)] if isinstance(value, (list, tuple)) else []

    first, second = flat(args[0]), flat(args[1]) if len(args) > 1 else []
    if name in ("send", "barrier"):
        return [], first if name == "send" else []
    if name in ("allreduce_", "allreduce_coalesced_", "broadcast_", "recv_", "reduce_"):
        return first, []
    return first, second


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def describe_group(group: dist.ProcessGroup | None) -> tuple[str, tuple[int, ...]]:
    """Return what a group is for, and its ranks."""
    group = dist.group.WORLD if group is None else group
    assert group is not None
    ranks = tuple(dist.get_process_group_ranks(group))
    return str(getattr(group, "group_desc", "") or "undefined"), ranks
