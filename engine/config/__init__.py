"""The configuration keys of every command, and how they are read, checked and written."""

from icegrt.config.base import CONFIG_FILE, Loadable, config_class, key
from icegrt.config.introspect import SECTIONS
from icegrt.config.schema import (
    CriticConfig,
    DataSource,
    ExportConfig,
    GenerateConfig,
    HTTPConfig,
    OffloadConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
    RewardCallConfig,
    RewardConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    SampleConfig,
    SamplingConfig,
    SFTConfig,
)

__all__ = [
    "CONFIG_FILE",
    "SECTIONS",
    "CriticConfig",
    "DataSource",
    "ExportConfig",
    "GenerateConfig",
    "HTTPConfig",
    "Loadable",
    "OffloadConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ParallelConfig",
    "RewardCallConfig",
    "RewardConfig",
    "RewardSource",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SampleConfig",
    "SamplingConfig",
    "config_class",
    "key",
]
