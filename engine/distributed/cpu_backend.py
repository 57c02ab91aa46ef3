"""What Megatron-core assumes of CUDA, supplied where there is none.

Megatron-core 0.16 says `torch.cuda.current_device()`, `tensor.cuda()` and `device="cuda"` by name. `supplies()` is a
context: inside it those names answer with the CPU, after it torch is as it was. Nothing global is slowed down: no
TorchFunctionMode; `device="cuda"` is mapped by a stand-in for the name `torch` in the few Megatron modules that say it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator

import torch

# Modules of megatron.core that pass device="cuda" to a tensor constructor.
_MODULES_SAYING_CUDA = (
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


class _TorchOnCPU(types.ModuleType):
    """`torch`, except that constructors asked for a CUDA device answer on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str):
        value = getattr(torch, name)
        if name not in _CONSTRUCTORS:
            return value

        def construct(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = _CPU
            return value(*args, **kwargs)

        return construct


class Patches:
    """Attributes set for a while, and put back in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, object]] = []

    def set(self, owner: object, name: str, value: object) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._undo:
            owner, name, value = self._undo.pop()
            setattr(owner, name, value)


def needed() -> bool:
    """True where torch sees no CUDA device."""
    return not torch.cuda.is_available()


@contextlib.contextmanager
def supplies() -> Iterator[None]:
    """Let Megatron-core run on this machine's CPU; a no-op where there is a CUDA device."""
    if not needed():
        yield
        return
    patches = Patches()
    try:
        _apply(patches)
        yield
    finally:
        patches.undo()


def _apply(patches: Patches) -> None:
    stand_in = _TorchOnCPU()
    modules = [importlib.import_module(f"megatron.core.{name}") for name in _MODULES_SAYING_CUDA]
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    patches.set(parallel_state, "create_group", _one_group_per_set_of_ranks(parallel_state.create_group))
    patches.set(torch.cuda, "current_device", lambda: _CPU)
    patches.set(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    patches.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    patches.set(torch.Tensor, "type", _type_as_seen_by_megatron(torch.Tensor.type))
    for module in modules:
        patches.set(module, "torch", stand_in)

    # Dropout is off everywhere, so the tracker has nothing to keep apart; activation recomputation still asks it.
    tracker = megatron_random.CudaRNGStatesTracker
    patches.set(tracker, "fork", lambda self, name=None: contextlib.nullcontext())
    patches.set(tracker, "get_states", lambda self: {})
    patches.set(tracker, "set_states", lambda self, states: None)
    patches.set(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8))
    patches.set(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8))
    patches.set(megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None)


def _one_group_per_set_of_ranks(create_group):
    # Megatron makes about 20 groups, most of them of the same ranks, and a gloo group is three threads, one of which
    # wakes a hundred times a second. Nothing overlaps on a CPU: the same group can serve every purpose.
    made = {}

    def create(ranks=None, *args, **kwargs):
        key = tuple(ranks)
        if key not in made:
            made[key] = create_group(ranks, *args, **kwargs)
        return made[key]

    return create


def _type_as_seen_by_megatron(original):
    # The optimizers sort parameters by the name of their type: 'torch.cuda.FloatTensor' and its like.
    def tensor_type(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        if args or kwargs or not isinstance(answer, str):
            return answer
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return answer.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core") else answer

    return tensor_type
