"""The meta device in the role of a GPU, and a world of ranks of which this process is one.

Inside `rehearsed_gpu` the names `torch.cuda.*`, `Tensor.is_cuda` and `device="cuda"` mean the meta device, whose
tensors have shapes and no data. Inside `rehearsed_world` the process groups are fake: a collective returns at once.
Nothing is patched outside the blocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from icegrt import _C
from icegrt.distributed import cluster as cluster_module
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.cpu_backend import Patches, apply_device
from icegrt.distributed.layout import Layout
from icegrt.distributed.megatron import load_megatron
from icegrt.errors import RunError
from icegrt.kernels.dispatch import play_device, played_kind, use_backend
from icegrt.rehearsal.attention import REHEARSED_KERNELS, attend_varlen, scaled_dot_product_attention
from icegrt.rehearsal.sites import current_site
from icegrt.rehearsal.watcher import Watcher

META = torch.device("meta")
# Of the extension; each writes into tensors that its caller has allocated.
_EXTENSION_OPERATORS = (
    "copy_blocks",
    "linear_rows",
    "logit_gradients",
    "logit_statistics",
    "packed_attention",
    "paged_attention",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope",
    "rope_write_kv",
    "sample_tokens",
    "swiglu_backward",
    "swiglu_forward",
    "write_kv",
)
# Bound to the device type: a collective of a host tensor then finds no backend, as in a group of NCCL.
_FAKE = "meta:fake"


class _Stream:
    """A CUDA stream or event of the rehearsed GPU: everything on it is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _LoneControl:
    """The control messages of one rank, to which no other rank answers: every answer is its own."""

    def __init__(self, *args: Any) -> None:
        self.phase = ""

    def any_rank(self, flags: Any = ()) -> list[bool]:
        return list(flags)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def stop(self) -> None:
        pass


@contextlib.contextmanager
def rehearsed_device(watcher: Watcher) -> Iterator[Patches]:
    """Let the meta device be the engine's device, as the CPU is on a machine without a GPU.

    Args:
        watcher: records what patched functions do; it is entered separately.

    Yields:
        The patches, for more of them.
    """
    load_megatron()
    patches = Patches()
    try:
        apply_device(patches, META)
        patches.set(torch.cuda, "synchronize", lambda *args, **kwargs: watcher.record_sync("torch.cuda.synchronize"))
        patches.set(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        patches.set(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(META))
        patches.set(torch.Tensor, "pin_memory", lambda tensor, *args: watcher.pinned_copy(tensor))
        # torch.tensor(..., device="meta") drops the data unseen. On a GPU it is a tensor of the host and a copy.
        patches.set(torch, "tensor", _via_host(torch.tensor))
        patches.set(torch, "as_tensor", _via_host(torch.as_tensor))
        yield patches
    finally:
        patches.undo()


@contextlib.contextmanager
def rehearsed_gpu(watcher: Watcher, memory_bytes: int) -> Iterator[None]:
    """Let the meta device play a GPU with `memory_bytes` of memory while the block runs.

    Args:
        watcher: records what patched functions do; it is entered separately.
        memory_bytes: of the GPU.
    """
    with rehearsed_device(watcher) as patches, play_device("meta", "cuda"):
        from torch.optim import optimizer as torch_optimizer

        from icegrt.kernels.packed_attention import reference
        from icegrt.model import attention, attention_parts

        # 1. torch.cuda.
        patches.set(torch.cuda, "is_available", lambda: True)
        patches.set(torch.cuda, "mem_get_info", lambda *args: (memory_bytes - watcher.device_bytes, memory_bytes))
        patches.set(torch.cuda, "empty_cache", lambda: None)
        patches.set(torch.cuda, "get_device_capability", lambda *args: (9, 0))
        for name in ("Stream", "Event", "current_stream", "default_stream"):
            patches.set(torch.cuda, name, _Stream)
        patches.set(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        # 2. Tensors.
        is_cuda: Any = torch.Tensor.is_cuda
        patches.set(torch.Tensor, "is_cuda", property(lambda tensor: tensor.is_meta or is_cuda.__get__(tensor)))
        # 3. What the GPU would choose: multi-tensor kernels of the optimizer, flash-attn, fused attention.
        supported = torch_optimizer._get_foreach_kernels_supported_devices
        patches.set(torch_optimizer, "_get_foreach_kernels_supported_devices", lambda: [*supported(), "meta"])
        patches.set(attention, "flash_attention", lambda: attend_varlen)
        patches.set(attention_parts, "flash_kernels", lambda: REHEARSED_KERNELS)
        patches.set(reference, "scaled_dot_product_attention", scaled_dot_product_attention)
        yield


@contextlib.contextmanager
def rehearsed_cpu(watcher: Watcher) -> Iterator[None]:
    """Let the meta device play the CPU that a run on gloo ranks computes on while the block runs.

    Operators of the C++ extension allocate what they allocate on a CPU, and compute nothing.

    Args:
        watcher: records what patched functions do; it is entered separately.
    """
    # The C++ routine of shaped_gae reads arrays. The reference allocates as little.
    with rehearsed_device(watcher) as patches, play_device("meta", "cpu"), use_backend(shaped_gae="reference"):
        from icegrt.model import attention_parts
        from icegrt.roles import optimizer

        for name in _EXTENSION_OPERATORS:
            patches.set(_C, name, lambda *args: None)
        patches.set(attention_parts, "part_kernels", lambda q: attention_parts.CPU_KERNELS)
        patches.set(optimizer, "_use_multi_tensor_kernels", lambda inner: None)  # as torch chooses on a CPU
        yield


def _via_host(construct: Any) -> Any:
    def constructed(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, torch.Tensor) or device is None or torch.device(device).type == "cpu":
            return construct(data, *args, device=device, **kwargs)
        return construct(data, *args, **kwargs).to(META)

    return constructed


@contextlib.contextmanager
def rehearsed_world(layout: Layout, rank: int, world_size: int, gpus_per_node: int) -> Iterator[Cluster]:
    """Open the cluster of one rank of `world_size`, with fake process groups, and close it after the block.

    Raises:
        RunError: this process has process groups already.
        ConfigError: the layout does not divide the world size.
    """
    if dist.is_initialized():
        raise RunError("this process has process groups already; rehearse in a process of its own")
    load_megatron()
    variables = {
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % gpus_per_node),
        "MASTER_ADDR": "rehearsal",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        patches = Patches()
        stack.callback(patches.undo)
        patches.set(cluster_module, "cpu_backend", contextlib.nullcontext)
        patches.set(cluster_module, "local_device", lambda: META)
        patches.set(cluster_module, "_opening_store", dist.HashStore)
        patches.set(cluster_module, "Control", _LoneControl)
        patches.set(cluster_module, "HangMonitor", _LoneControl)
        for name in ("broadcast_object_list", "all_gather_object", "gather_object"):
            patches.set(dist, name, _object_collective(name))
        patches.set(dist, "init_process_group", _first_group(dist.init_process_group))
        patches.set(dist, "new_group", _further_group(dist.new_group))
        cluster = Cluster.open(layout)
        stack.callback(cluster.close)  # without the error: no other rank waits to hear of it
        yield cluster


def _first_group(init_process_group: Any) -> Any:
    """Return torch's function with fake groups in the role of NCCL's; other backends are refused."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def init(backend: str, *, store: Any, world_size: int, rank: int, **options: Any) -> None:
        _check_backend(backend)
        init_process_group(_FAKE, store=FakeStore(), world_size=world_size, rank=rank)
        _name_backend(dist.group.WORLD)

    return init


def _further_group(new_group: Any) -> Any:
    """Return torch's function with fake groups in the role of NCCL's; other backends are refused."""

    def new(*args: Any, backend: str | None = None, **options: Any) -> Any:
        _check_backend(backend)
        group = new_group(*args, **options)
        _name_backend(group)
        return group

    return new


def _check_backend(backend: str | None) -> None:
    if backend not in (None, "nccl") and played_kind("meta") == "cuda":
        raise RunError(f"{current_site()}: a process group of {backend}; on GPUs every group is NCCL's alone")


def _name_backend(group: Any) -> None:
    # torch 2: a group of one device type has no default backend -> torch warns when the group is destroyed.
    if isinstance(group, dist.ProcessGroup):
        group._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)


def _object_collective(name: str) -> Any:
    """Return a collective of Python objects that is counted, and in which every rank has this rank's object."""

    def broadcast(objects: list[Any], src: int = 0, group: Any = None, **kwargs: Any) -> None:
        Watcher.current().record_object_collective(name, group, objects)

    def gather(objects: list[Any] | None, value: Any, group: Any = None, **kwargs: Any) -> None:
        Watcher.current().record_object_collective(name, group, value)
        if objects is not None:
            objects[:] = [value] * len(objects)

    def gather_to_one(value: Any, objects: list[Any] | None = None, group: Any = None, **kwargs: Any) -> None:
        gather(objects, value, group)

    return {"broadcast_object_list": broadcast, "all_gather_object": gather, "gather_object": gather_to_one}[name]
