"""The configuration keys of every command, and how they are read, checked and written."""

from icegrt.config.base import CONFIG_FILE, Loadable, config_class, key
from icegrt.config.introspect import SECTIONS
from icegrt.config.ppo import (
    CriticConfig,
    HTTPConfig,
    OffloadConfig,
    PPOConfig,
    RewardCallConfig,
    RewardSource,
)
from icegrt.config.shared import (
    DataSource,
    LoRAConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from icegrt.config.stages import (
    ExportConfig,
    GenerateConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
    ValueConfig,
)
from icegrt.config.study import (
    StudyBase,
    StudyConfig,
    StudyContrast,
    StudyMeasure,
    StudyPilot,
    StudySetting,
)

__all__ = [
    "CONFIG_FILE",
    "SECTIONS",
    "CriticConfig",
    "DataSource",
    "ExportConfig",
    "GenerateConfig",
    "HTTPConfig",
    "LoRAConfig",
    "Loadable",
    "OffloadConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RewardCallConfig",
    "RewardConfig",
    "RewardSource",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SampleConfig",
    "SamplingConfig",
    "StudyBase",
    "StudyConfig",
    "StudyContrast",
    "StudyMeasure",
    "StudyPilot",
    "StudySetting",
    "ValueConfig",
    "config_class",
    "key",
]
