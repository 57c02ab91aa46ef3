"""The metrics records that trainers yield, and the log of a run."""

from icegrt.metrics.records import (
    PHASE_LABELS,
    PHASES,
    Evaluation,
    PPOStep,
    RewardStep,
    SFTStep,
    ValueStep,
    step_from_row,
)
from icegrt.metrics.run_log import RunLog, calibration_path, drop_rollouts, read_metrics, rollout_path

__all__ = [
    "PHASES",
    "PHASE_LABELS",
    "Evaluation",
    "PPOStep",
    "RewardStep",
    "RunLog",
    "SFTStep",
    "ValueStep",
    "calibration_path",
    "drop_rollouts",
    "read_metrics",
    "rollout_path",
    "step_from_row",
]
