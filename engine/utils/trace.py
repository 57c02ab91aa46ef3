"""Named ranges of a trace. Without a running profiler a range costs a check."""

from __future__ import annotations

import contextlib

import torch


def trace_range(name: str) -> contextlib.AbstractContextManager[object]:
    """Return a context whose operators stand under `name` in the trace of a running profiler."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.profiler.record_function(name)
