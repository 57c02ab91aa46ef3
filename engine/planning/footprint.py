"""The peaks of memory of a rehearsed run, by phase, kind of rank and category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icegrt.rehearsal.memory import Peak
from icegrt.rehearsal.phases import ACTOR, ADVANTAGES, CRITIC, DECODE, INFERENCE, PHASES, PREFILL
from icegrt.rehearsal.rehearsal import RankRehearsal, Rehearsal


@dataclass(frozen=True)
class MemoryPeak:
    """The largest sum of live storages of a phase.

    Attributes:
        bytes: the sum.
        by_category: its parts that are not 0.
    """

    bytes: int
    by_category: dict[str, int]

    @classmethod
    def of(cls, peak: Peak) -> MemoryPeak:
        """Return the figures of a ledger's peak."""
        return cls(peak.bytes, {name: size for name, size in peak.by_category.items() if size})


@dataclass(frozen=True)
class PhaseMemory:
    """The peaks of one phase."""

    device: MemoryPeak
    host: MemoryPeak


@dataclass(frozen=True)
class RankMemory:
    """The memory of a rank that stands for all of its kind.

    Attributes:
        kind: "every rank", or the pipeline stage.
        rank: global rank.
        phases: by name, in the order of an iteration.
    """

    kind: str
    rank: int
    phases: dict[str, PhaseMemory]

    @classmethod
    def of(cls, rank: RankRehearsal) -> RankMemory:
        """Return the peaks of a rehearsed rank."""
        watcher = rank.counts.watcher
        spans = {name: watcher.phases[name].spans for name in PHASES if name in watcher.phases}
        phases = {
            name: PhaseMemory(
                MemoryPeak.of(watcher.device.largest_peak(span[:2] for span in found)),
                MemoryPeak.of(watcher.host.largest_peak(span[2:] for span in found)),
            )
            for name, found in spans.items()
        }
        return cls(rank.kind, rank.rank, phases)

    @property
    def device_bytes(self) -> int:
        """The peak of device memory over all phases."""
        return max(phase.device.bytes for phase in self.phases.values())

    @property
    def host_bytes(self) -> int:
        """The peak of host memory over all phases."""
        return max(phase.host.bytes for phase in self.phases.values())


# Phases of a run, by the names in its metrics, and their phases in a rehearsal.
_RUN_PHASES = {"rollout": (PREFILL, DECODE), "score": (INFERENCE,), "shape": (ADVANTAGES,), "update": (ACTOR, CRITIC)}


def run_peaks(ranks: Sequence[RankMemory]) -> dict[str, int]:
    """Return the largest peak of device memory of all kinds of rank, by phase of a run."""
    return {
        phase: max(rank.phases[name].device.bytes for rank in ranks for name in names if name in rank.phases)
        for phase, names in _RUN_PHASES.items()
    }


def memory_of(rehearsal: Rehearsal) -> list[RankMemory]:
    """Return the memory of each kind of rank."""
    return [RankMemory.of(rank) for rank in rehearsal.ranks]


def device_bytes(ranks: Sequence[RankMemory]) -> int:
    """Return the largest peak of device memory of all kinds of rank."""
    return max(rank.device_bytes for rank in ranks)


def host_bytes(ranks: Sequence[RankMemory]) -> int:
    """Return the largest peak of host memory of all kinds of rank."""
    return max(rank.host_bytes for rank in ranks)
