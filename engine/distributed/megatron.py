"""Load Megatron-core: without its warnings, and on CPU builds without torch's compiler and Triton."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator

import torch

from icegrt.distributed.cpu_backend import Patches
from icegrt.utils.collector import collector_paused

# Importing this module loads all of Megatron-core that a model needs.
_ENTRY = "megatron.core.models.gpt.gpt_layer_specs"
# Megatron 0.16: warns at import about packages that icegrt does not use, and under a newer torch in every run. Users
# can do nothing about these warnings -> they are ignored.
_IGNORED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    r"`torch\.distributed\.\w+` is deprecated",
)
# Megatron 0.16: tensor parallelism warns that CUDA_DEVICE_MAX_CONNECTIONS is not 1, without a GPU too -> ignored there.
_ADVICE_FOR_GPUS = (r"When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",)


def load_megatron() -> None:
    """Import Megatron-core and ignore its warnings in this process. `Cluster.open` calls it.

    Raises:
        ModuleNotFoundError: Megatron-core is not installed.
    """
    cpu_build = torch.version.cuda is None
    for message in (*_IGNORED_WARNINGS, *(_ADVICE_FOR_GPUS if cpu_build else ())):
        warnings.filterwarnings("ignore", message=message)
    if _ENTRY not in sys.modules:
        with collector_paused(), _without_compiler() if cpu_build else contextlib.nullcontext():
            importlib.import_module(_ENTRY)


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    # Megatron 0.16: its import marks functions for torch.compile and looks for Triton -> 140 MB and a second in every
    # process, for functions that `Architecture.transformer_config` switches off. Inside the block torch.compile
    # returns its argument, and an import of Triton raises ImportError.
    patches = Patches()
    hide_triton = "triton" not in sys.modules
    patches.set(torch, "compile", lambda function=None, **options: function or (lambda decorated: decorated))
    if hide_triton:
        sys.modules["triton"] = None
    try:
        yield
    finally:
        patches.undo()
        if hide_triton:
            del sys.modules["triton"]
