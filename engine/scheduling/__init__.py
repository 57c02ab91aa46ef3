"""Continuous batching over a paged KV cache. Imports numpy and the C++ extension only; works without a model."""

from icegrt.scheduling.block_scheduler import BlockScheduler, StepPlan

__all__ = ["BlockScheduler", "StepPlan"]
