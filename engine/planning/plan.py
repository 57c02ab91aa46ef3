"""The plan of a run: what it needs, whether it fits, and the changes that make it fit, each with its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from icegrt.config import PPOConfig
from icegrt.planning.changes import AXES, Cluster
from icegrt.planning.cost import Cost, cost_of
from icegrt.planning.footprint import RankMemory, memory_of
from icegrt.planning.search import Candidate, Search
from icegrt.rehearsal.hardware import Hardware
from icegrt.rehearsal.rehearsal import rehearse
from icegrt.rehearsal.workload import Workload

_PROPOSALS = 4  # with their costs, which take a complete rehearsal each


@dataclass(frozen=True)
class Proposal:
    """Changes that make the run fit.

    Attributes:
        candidate: the changes and their memory.
        cost: of an iteration.
        extra: what it costs beyond the configuration without the changes.
    """

    candidate: Candidate
    cost: Cost
    extra: Cost


@dataclass(frozen=True)
class Plan:
    """The plan of one configuration.

    Attributes:
        config: of the run.
        cluster: GPUs of the run.
        hardware: the GPU.
        workload: the lengths.
        base: the configuration without changes.
        fits: whether it fits.
        proposals: changes that make it fit, the cheapest first; none if it fits, or if they do not suffice.
        cost: of an iteration of the configuration without changes; None: not rehearsed.
        rehearsed: number of rehearsed configurations.
    """

    config: PPOConfig
    cluster: Cluster
    hardware: Hardware
    workload: Workload
    base: Candidate
    fits: bool
    proposals: list[Proposal]
    cost: Cost | None
    rehearsed: int


def plan(
    config: PPOConfig,
    *,
    gpus: int,
    gpus_per_node: int,
    hardware: Hardware,
    workload: Workload,
    axes: Iterable[str] = AXES,
    on_cpu: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Rehearse the peaks of a run; if it does not fit, search for changes that make it fit, and rehearse their costs.

    Args:
        config: of the run.
        gpus: ranks of the run.
        gpus_per_node: GPUs of a node.
        hardware: the GPU.
        workload: lengths of prompts and responses.
        axes: of `AXES`, what may change; empty: nothing.
        on_cpu: the ranks compute on CPUs.
        report: called with a line of progress.

    Raises:
        ConfigError: keys contradict each other, or the layout does not divide GPUs or model.
        CheckpointError: a `config.json` is missing or not supported.
    """

    cluster = Cluster(gpus, gpus_per_node, max(workload.prompts, default=0) + config.sampling.max_new_tokens)
    machine = {"gpus": gpus, "gpus_per_node": gpus_per_node, "hardware": hardware, "on_cpu": on_cpu}

    def peaks(candidate: PPOConfig) -> Sequence[RankMemory]:
        return memory_of(rehearse(candidate, **machine, workload=workload, peaks_only=True))

    def cost(candidate: Candidate) -> Cost:
        report(f"cost of {' '.join(map(str, candidate.changes)) or 'the configuration'}")
        return cost_of(rehearse(candidate.config, **machine, workload=workload))

    search = Search(config, cluster, peaks, hardware.usable_bytes, axes, report)
    fits, proposals, base_cost = search.fits(search.base), [], None
    found = [] if fits else sorted(search.run(), key=lambda candidate: len(candidate.changes))[:_PROPOSALS]
    if found:
        base_cost = cost(search.base)
        costs = [cost(candidate) for candidate in found]
        proposals = [Proposal(c, own, own.beyond(base_cost)) for c, own in zip(found, costs, strict=True)]
        proposals.sort(key=lambda proposal: proposal.cost.seconds)
    return Plan(config, cluster, hardware, workload, search.base, fits, proposals, base_cost, search.rehearsed)
