"""From the environment to process groups: torchrun's variables (or one process alone) -> Megatron's parallel_state.

`Cluster.open()` may be called by several trainers of one process: they share it, and the last `close()` takes the
process groups and the CPU supplies down again.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from icegrt import cpu
from icegrt.errors import RunError

# What Megatron-core 0.16 says on import (icegrt needs neither Transformer Engine nor apex) and provokes under a newer
# torch on every run; nobody can act on it.
_NOT_FOR_USERS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    r"`torch\.distributed\.\w+` is deprecated",
)


@dataclass(frozen=True)
class Layout:
    """How ranks are divided. One rank for now: tensor, pipeline and data parallel sizes multiply to the world size."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def model(self) -> int:
        return self.tensor * self.pipeline


@dataclass
class Cluster:
    """This process's place among all: rank, device, and the data-parallel group."""

    layout: Layout
    rank: int
    world_size: int
    device: torch.device
    _stack: contextlib.ExitStack = field(repr=False)
    _users: int = 1

    _current = None

    @classmethod
    def open(cls, layout: Layout | None = None) -> Cluster:
        """Join (or start) the process groups. Raises `RunError` when the world size does not fit the layout."""
        layout = layout or Layout()
        if cls._current is not None:
            if cls._current.layout != layout:
                raise RunError(f"this process already runs {cls._current.layout}; close it before opening {layout}")
            cls._current._users += 1
            return cls._current
        cls._current = _start(layout)
        return cls._current

    def close(self) -> None:
        """Leave; the last user takes the process groups down."""
        self._users -= 1
        if self._users == 0:
            Cluster._current = None
            self._stack.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters and see different sequences (context parallelism included)."""
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _start(layout: Layout) -> Cluster:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world_size != layout.model:
        raise RunError(
            f"torchrun started {world_size} ranks, but this version trains with {layout.model} "
            f"(tensor {layout.tensor} x pipeline {layout.pipeline}, no data parallelism yet): "
            f"use --nproc-per-node {layout.model}"
        )
    with contextlib.ExitStack() as stack:
        hide_megatron_warnings()
        from megatron.core import parallel_state

        stack.enter_context(cpu.supplies())
        device = _device()
        if not dist.is_initialized():
            _join(world_size, rank, device)
            stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, create_gloo_process_groups=True)
        stack.callback(parallel_state.destroy_model_parallel)
        kept = stack.pop_all()
    return Cluster(layout, rank, world_size, device, kept)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _join(world_size: int, rank: int, device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:  # one process that nobody launched: no port is needed
        dist.init_process_group(backend, store=dist.HashStore(), world_size=world_size, rank=rank)


def hide_megatron_warnings() -> None:
    """Silence the warnings above; called before Megatron-core is imported."""
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
