"""Profile a few steps of a run with PyTorch's profiler, and write trace, memory and a summary (`profile`)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from icegrt.config import ProfileConfig
from icegrt.distributed.cluster import Cluster
from icegrt.errors import ConfigError
from icegrt.report.profile import PROFILE_FOLDER, summary_text
from icegrt.utils.console import print_info, warn
from icegrt.utils.files import fsync_path, write_text_atomic
from icegrt.utils.trace import trace_range

_HISTORY_ENTRIES = 1_000_000


class StepProfiler:
    """Profile `config.steps` steps after the first `config.skip` ones of this process.

    Nothing is installed outside of these steps. Files of the rank, in `<run.dir>/profile`:

    * `trace_rank0.json`: the trace, for Perfetto or chrome://tracing.
    * `summary_rank0.txt`: ranges, operators, idle time and memory, from the trace.
    * `memory_rank0.pickle`: with `config.memory` on a GPU, allocations for pytorch.org/memory_viz.

    Args:
        config: the `profile` section.
        section: the command, for messages.
        cluster: ranks.
        run_dir: the run's folder.
        unit: name of a step, in the plural.

    Raises:
        ConfigError: `config.ranks` names a rank that does not exist.
    """

    def __init__(self, config: ProfileConfig, section: str, cluster: Cluster, run_dir: Path, unit: str) -> None:
        unknown = [rank for rank in config.ranks if not 0 <= rank < cluster.world_size]
        if unknown:
            raise ConfigError(
                f"{section}.profile.ranks: {unknown[0]} is no rank of this run, which has {cluster.world_size}; "
                "empty: all ranks"
            )
        self.config, self.section, self.unit = config, section, unit
        self.rank, self.folder = cluster.rank, run_dir / PROFILE_FOLDER
        is_profiled = not config.ranks or self.rank in config.ranks
        self._remaining = config.steps if is_profiled else 0
        self._to_skip = config.skip
        self._profile: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def step(self, number: int, is_last: Callable[[], bool]) -> Iterator[None]:
        """Run one step inside; it is profiled if it is due.

        Args:
            number: of the step, from 1.
            is_last: returns after the step whether the run ends with it.
        """
        if not self._remaining:
            yield
            return
        if self._to_skip:
            self._to_skip -= 1
            yield
            if is_last():
                self._remaining = 0
                warn(f"{self.section}.profile.skip is {self.config.skip}: the run ended before a step was profiled")
            return
        if self._profile is None:
            self._start()
        with trace_range(f"{self.unit.removesuffix('s')} {number}"):
            yield
        self._remaining -= 1
        if is_last() or not self._remaining:
            self._remaining = 0
            try:
                self._write()
            except OSError as error:
                warn(f"{error.filename or self.folder}: the profile is not written ({error.strerror}); the run goes on")

    def close(self) -> None:
        """Stop a profiler that a failed step has left running; its trace is not written."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
            self._stop_memory_history()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self._has_memory_history:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
        self._profile = torch.profiler.profile(
            activities=activities, profile_memory=self.config.memory, with_stack=self.config.with_stack
        )
        self._profile.start()

    @property
    def _has_memory_history(self) -> bool:
        return self.config.memory and torch.cuda.is_available()

    def _stop_memory_history(self) -> None:
        if self._has_memory_history:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._has_memory_history:
            self._export(f"memory_rank{self.rank}.pickle", torch.cuda.memory._dump_snapshot)
            self._stop_memory_history()
        trace = self._export(f"trace_rank{self.rank}.json", profile.export_chrome_trace)
        summary = self.folder / f"summary_rank{self.rank}.txt"
        with trace.open(encoding="utf-8") as file:
            events: dict[str, Any] = json.load(file)
        write_text_atomic(summary, summary_text(events))
        print_info(f"profile: {summary}, {trace}")

    def _export(self, name: str, export: Any) -> Path:
        """Write a file by `export(path)`, atomically."""
        path = self.folder / name
        partial = self.folder / f".partial.{name}"
        try:
            export(str(partial))
            fsync_path(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return path
