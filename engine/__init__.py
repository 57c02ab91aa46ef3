"""icegrt: PPO for language models, with four Megatron-core models in one set of processes.

`__all__` lists the public names; each is imported on first use, so `import icegrt` alone imports nothing else.
`icegrt.kernels` and `icegrt.packing` need neither Megatron nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icegrt import kernels as kernels
    from icegrt import packing as packing
    from icegrt.config import (
        ExportConfig,
        GenerateConfig,
        PPOConfig,
        RewardConfig,
        SampleConfig,
        SFTConfig,
        ValueConfig,
    )
    from icegrt.errors import CheckpointError, ConfigError, DataError, RewardError, RunError, UserError
    from icegrt.metrics import Evaluation, PPOStep, RewardStep, SFTStep, ValueStep
    from icegrt.ppo.trainer import PPOTrainer
    from icegrt.ppo.value import ValueTrainer
    from icegrt.rewards.sample import RewardResult, Sample
    from icegrt.rollout.engine import RolloutEngine
    from icegrt.rollout.load import load_actor
    from icegrt.rollout.types import Response, Sampling
    from icegrt.training.callbacks import Callback
    from icegrt.training.reward_model import RewardTrainer
    from icegrt.training.sft import SFTTrainer

    __version__: str

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Evaluation",
    "ExportConfig",
    "GenerateConfig",
    "PPOConfig",
    "PPOStep",
    "PPOTrainer",
    "Response",
    "RewardConfig",
    "RewardError",
    "RewardResult",
    "RewardStep",
    "RewardTrainer",
    "RolloutEngine",
    "RunError",
    "SFTConfig",
    "SFTStep",
    "SFTTrainer",
    "Sample",
    "SampleConfig",
    "Sampling",
    "UserError",
    "ValueConfig",
    "ValueStep",
    "ValueTrainer",
    "__version__",
    "load_actor",
]

_HOMES = {
    "config": (
        "ExportConfig",
        "GenerateConfig",
        "PPOConfig",
        "RewardConfig",
        "SampleConfig",
        "SFTConfig",
        "ValueConfig",
    ),
    "errors": ("CheckpointError", "ConfigError", "DataError", "RewardError", "RunError", "UserError"),
    "metrics": ("Evaluation", "PPOStep", "RewardStep", "SFTStep", "ValueStep"),
    "rewards.sample": ("RewardResult", "Sample"),
    "rollout.engine": ("RolloutEngine",),
    "rollout.load": ("load_actor",),
    "rollout.types": ("Response", "Sampling"),
    "ppo.trainer": ("PPOTrainer",),
    "ppo.value": ("ValueTrainer",),
    "training.reward_model": ("RewardTrainer",),
    "training.sft": ("SFTTrainer",),
    "training.callbacks": ("Callback",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_LIBRARY_MODULES = ("kernels", "packing")


def _import_public(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"icegrt.{_HOME_OF[name]}"), name)
    elif name in _LIBRARY_MODULES:
        value = importlib.import_module(f"icegrt.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'icegrt' has no attribute {name!r}")
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # type checkers would accept any name
    __getattr__ = _import_public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LIBRARY_MODULES})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("icegrt")
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return "0+unknown"
