"""The measured peaks of memory of a run beside those that `icegrt plan` rehearsed (`ppo.memory_plan`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icegrt.config import PPOConfig
from icegrt.config.loader import as_dict
from icegrt.distributed.cluster import Cluster
from icegrt.errors import CheckpointError, ConfigError
from icegrt.metrics.records import PHASE_LABELS
from icegrt.report.memory_table import MEMORY_FILE
from icegrt.training.trainer import write_json
from icegrt.utils.console import print_info, warn
from icegrt.utils.files import json_safe, read_object
from icegrt.utils.values import flatten

_SHOWN_AT = 2  # the first iteration in which Adam's moments exist from the start
# Keys that no peak depends on.
_OTHER_KEYS = (
    "run.dir", "run.resume", "run.overwrite", "run.log_to", "run.checkpoint_in_background", "iterations", "prompts",
    "eval_prompts", "eval_every", "eval_limit", "checkpoint_every", "keep_checkpoints", "memory_plan", "profile",
    "reward", "reward_function", "optimizer", "critic.optimizer", "sampling.stop", "sampling.stop_token_ids",
)  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """A plan as its file has it.

    Attributes:
        path: of the file.
        ranks: of the planned run.
        peaks: bytes of device memory by phase of a run.
        config: keys of the planned configuration.
    """

    path: str
    ranks: int
    peaks: dict[str, int]
    config: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> MemoryPlan:
        """Read the file that `icegrt plan --out` wrote.

        Raises:
            ConfigError: it cannot be read, or is no plan.
        """
        try:
            document = read_object(Path(path))
            return cls(path, document["gpus"], document["peaks"], document["config"])
        except (CheckpointError, KeyError) as error:
            raise ConfigError(f"ppo.memory_plan: {path} is no plan ({error}); `icegrt plan --out` writes one") from None

    def differences(self, config: PPOConfig, ranks: int) -> list[str]:
        """Return what differs between the planned run and this one, as texts."""
        run = dict(flatten(json_safe(as_dict(config))))
        planned = dict(flatten(self.config))
        keys = [name for name in run if not name.startswith(_OTHER_KEYS) and run[name] != planned.get(name)]
        texts = [f"ppo.{name}={planned.get(name)} (the run: {run[name]})" for name in keys]
        return [*texts, *([f"{self.ranks} ranks (the run: {ranks})"] if ranks != self.ranks else [])]


class PeakMeter:
    """The peak of memory of this process's device: of CUDA's allocations, or of resident memory on a CPU.

    Args:
        device: of the process. What is resident on a CPU when the meter is made does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0 if device.type == "cuda" else _status_bytes("VmRSS")

    @property
    def measure(self) -> str:
        """What is measured, as text."""
        return (
            "torch.cuda.max_memory_allocated"
            if self._device.type == "cuda"
            else "resident memory of the process, above that before the models were built"
        )

    def reset(self) -> None:
        """Forget the peak so far. Where the system does not allow it, later peaks are those since the start."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak since the last reset, in bytes; 0 where the system does not report it."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return max(0, _status_bytes("VmHWM") - self._baseline)


class MemoryLog:
    """Measures the peak of each phase and writes it beside the planned one. Make it before the models are built.

    Args:
        plan: of the run.
        config: of the run; what differs from the planned configuration is a warning.
        cluster: the ranks.
    """

    def __init__(self, plan: MemoryPlan, config: PPOConfig, cluster: Cluster) -> None:
        self._plan, self._cluster = plan, cluster
        self._meter = PeakMeter(cluster.device)
        self._peaks: dict[str, int] = {}
        differences = plan.differences(config, cluster.world_size)
        if differences and cluster.is_main:
            warn(f"{plan.path} is the plan of another run: {', '.join(differences)}. Make it again")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block."""
        self._meter.reset()
        yield
        self._peaks[name] = max(self._peaks.get(name, 0), self._meter.peak())

    def write(self, folder: Path, iteration: int, last: int) -> None:
        """Write the largest peaks of all ranks so far, and print them once. Collective.

        Args:
            folder: of the run.
            iteration: that has ended.
            last: number of the last iteration.
        """
        ranks = self._cluster.gather_to_main(self._peaks)
        if not ranks:
            return
        measured = {name: max(peaks.get(name, 0) for peaks in ranks) for name in ranks[0]}
        document = {
            "planned": self._plan.peaks,
            "measured": measured,
            "measure": self._meter.measure,
            "plan": self._plan.path,
            "iterations": iteration,
        }
        write_json(folder / MEMORY_FILE, document)
        if iteration == min(_SHOWN_AT, last):
            print_info(f"peak memory, planned and measured ({self._meter.measure}): {_summary(document)}")


def _summary(document: Mapping[str, Any]) -> str:
    planned, measured = document["planned"], document["measured"]
    return ", ".join(
        f"{PHASE_LABELS.get(name, name)} {size / 1e9:.3g} and {measured[name] / 1e9:.3g} GB"
        for name, size in planned.items()
        if name in measured
    )


def _status_bytes(field: str) -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:")), 0)
    except OSError:
        return 0
