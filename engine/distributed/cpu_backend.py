"""Run Megatron-core on the CPU, or on another device in the role of the GPU.

Megatron 0.16 calls `torch.cuda.current_device()`, `tensor.cuda()` and `device="cuda"` unconditionally. Inside the
context `cpu_backend()` these names return the CPU; after it torch is unpatched. A TorchFunctionMode would slow down
every operation, so `device="cuda"` is mapped by a proxy of `torch` in the few Megatron modules that use it.
A rehearsal has the meta device play the GPU by the same patches.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import sys
import types
from collections.abc import Iterator

import torch
import torch.distributed as dist

# Modules of megatron.core that pass device="cuda" to a tensor constructor.
_MODULES_WITH_CUDA_DEVICE = (
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "utils",
    "distributed.param_and_grad_buffer",
    "tensor_parallel.data",
    "dist_checkpointing.exchange_utils",
)
_CONSTRUCTORS = frozenset(
    [
        "arange",
        "as_tensor",
        "empty",
        "empty_like",
        "full",
        "full_like",
        "ones",
        "ones_like",
        "rand",
        "randn",
        "tensor",
        "zeros",
        "zeros_like",
    ]
)
_CPU = torch.device("cpu")


class _TorchOnDevice(types.ModuleType):
    """A proxy of `torch` whose tensor constructors replace a CUDA device by another."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("torch")
        self._device = device

    def __getattr__(self, name: str):
        value = getattr(torch, name)
        if name not in _CONSTRUCTORS:
            return value

        def construct(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = self._device
            return value(*args, **kwargs)

        return construct


class Patches:
    """Attributes that are patched, and restored in reverse order by `undo` or at the end of a `with`."""

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, object]] = []

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def set(self, owner: object, name: str, value: object) -> None:
        """Set an attribute and remember its present value."""
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Restore all attributes."""
        while self._undo:
            owner, name, value = self._undo.pop()
            setattr(owner, name, value)


@contextlib.contextmanager
def cpu_backend() -> Iterator[None]:
    """Patch torch and Megatron-core to run on the CPU while the block runs. A no-op if there is a CUDA device."""
    if torch.cuda.is_available():
        yield
        return
    patches = Patches()
    try:
        from megatron.core import parallel_state

        if dist.is_gloo_available():
            patches.set(dist.ProcessGroupGloo, "__init__", _with_one_worker(dist.ProcessGroupGloo.__init__))
        patches.set(parallel_state, "create_group", _reuse_groups(parallel_state.create_group))
        patches.set(torch.cuda, "synchronize", lambda *args, **kwargs: None)
        patches.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
        apply_device(patches, _CPU)
        yield
    finally:
        patches.undo()


def apply_device(patches: Patches, device: torch.device) -> None:
    """Patch torch and Megatron-core so that `device` plays the current CUDA device.

    Args:
        patches: collects the patches; the caller undoes them.
        device: the CPU, or the meta device.
    """
    modules = [importlib.import_module(f"megatron.core.{name}") for name in _MODULES_WITH_CUDA_DEVICE]
    from megatron.core.tensor_parallel import random as megatron_random

    patches.set(torch.cuda, "current_device", lambda: device)
    patches.set(torch.Tensor, "type", _cuda_type_names(torch.Tensor.type))
    torch_on_device = _TorchOnDevice(device)
    for module in modules:
        patches.set(module, "torch", torch_on_device)

    # Activation recomputation saves and restores CUDA's generators. Dropout is off, so empty states are enough.
    tracker = megatron_random.CudaRNGStatesTracker
    patches.set(tracker, "fork", lambda self, name=None: contextlib.nullcontext())
    patches.set(tracker, "get_states", lambda self: {})
    patches.set(tracker, "set_states", lambda self, states: None)
    patches.set(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8))
    patches.set(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8))
    patches.set(megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None)


def _with_one_worker(initialize):
    # Torch 2.13: a gloo group has two workers, and each assigns the name of its collective to the same string when the
    # collective is complete, without a lock. The caller does not wait for that, so the next collective may end at the
    # same time -> a name is freed twice, and a later malloc fails. Collectives of one group take turns anyway, so one
    # worker runs them.
    def one_worker(
        group: dist.ProcessGroupGloo, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta
    ) -> None:
        options = group._Options()
        options._threads, options._timeout = 1, timeout
        # As torch does it if it is given no options.
        interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
        if interfaces:
            options._devices = [group.create_device(interface=name) for name in interfaces.split(",")]
        else:
            options._devices = [group.create_default_device()]
        initialize(group, store, rank, size, options)

    return one_worker


def _reuse_groups(create_group):
    # Megatron 0.16: creates about 20 groups, most of the same ranks -> two gloo threads each, one of which wakes a
    # hundred times a second. Nothing overlaps on a CPU, so one group per set of ranks serves every purpose.
    groups = {}

    def create(ranks=None, *args, **kwargs):
        key = tuple(ranks)
        if key not in groups:
            groups[key] = create_group(ranks, *args, **kwargs)
        return groups[key]

    return create


def _cuda_type_names(original):
    # Megatron 0.16: its optimizers sort parameters by type name and know 'torch.cuda.FloatTensor' only -> calls from
    # Megatron get that name.
    def tensor_type(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if args or kwargs or not isinstance(result, str):
            return result
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return f"torch.cuda.{result.split('.')[-1]}" if caller.startswith("megatron.core") else result

    return tensor_type
