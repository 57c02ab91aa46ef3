"""Load Megatron-core quietly and without what it does not need here."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings

import torch

from icegrt.distributed.cpu_backend import Patches

# What Megatron-core 0.16 says on import (icegrt needs neither Transformer Engine nor apex) and provokes under a newer
# torch on every run; nobody can act on it.
_NOT_FOR_USERS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    r"`torch\.distributed\.\w+` is deprecated",
)
# Megatron 0.16: tensor parallelism warns that CUDA_DEVICE_MAX_CONNECTIONS is not 1, on a CPU too -> ignored there.
_ADVICE_FOR_GPUS = r"When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS"


def hide_megatron_warnings() -> None:
    """Silence the warnings above; called before Megatron-core is imported."""
    messages = _NOT_FOR_USERS if torch.version.cuda is not None else (*_NOT_FOR_USERS, _ADVICE_FOR_GPUS)
    for message in messages:
        warnings.filterwarnings("ignore", message=message)


def import_megatron() -> None:
    """Import Megatron-core, if it is there; in a torch built for CPUs alone, without torch's compiler and Triton.

    As it is imported, Megatron marks functions for torch.compile and looks for Triton: 140 MB and a second in every
    process, for functions that `transformer_config` switches off.
    """
    patches = Patches()
    hidden = torch.version.cuda is None and "triton" not in sys.modules
    if torch.version.cuda is None:
        patches.set(torch, "compile", lambda function=None, **options: function or (lambda given: given))
    if hidden:
        sys.modules["triton"] = None  # an import of it raises ImportError
    try:
        with contextlib.suppress(ModuleNotFoundError):  # what needs Megatron says so
            importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    finally:
        patches.undo()
        if hidden:
            del sys.modules["triton"]
