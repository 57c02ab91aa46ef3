"""Metrics: the records that trainers yield, the log of a run, and what watches it."""

from icegrt.metrics.run_log import (
    PHASES,
    Evaluation,
    JsonlWriter,
    PPOStep,
    RewardStep,
    RunLog,
    SFTStep,
    drop_rollouts,
    json_safe,
    read_metrics,
    rollout_path,
    step_from_row,
    write_text_aside,
)

__all__ = [
    "PHASES",
    "Evaluation",
    "JsonlWriter",
    "PPOStep",
    "RewardStep",
    "RunLog",
    "SFTStep",
    "drop_rollouts",
    "json_safe",
    "read_metrics",
    "rollout_path",
    "step_from_row",
    "write_text_aside",
]
