"""What an iteration costs a GPU: FLOPs, and bytes moved. The figures are sums of a rehearsal's counts."""

from __future__ import annotations

from dataclasses import dataclass

from icegrt.rehearsal.bounds import bound_of
from icegrt.rehearsal.counts import PhaseCounts
from icegrt.rehearsal.phases import BUILD
from icegrt.rehearsal.rehearsal import RankRehearsal, Rehearsal


@dataclass(frozen=True)
class Cost:
    """The work of one iteration on one GPU.

    Attributes:
        flops: of matrix products and attention.
        host_bytes: copied between host and device, in both directions.
        collective_bytes: of the tensors of collectives and messages.
        memory_bytes: that operators read and write in device memory.
        seconds: at the maker's peaks, if nothing overlaps. It orders candidates, and predicts nothing.
    """

    flops: float
    host_bytes: float
    collective_bytes: float
    memory_bytes: float
    seconds: float

    def beyond(self, other: Cost) -> Cost:
        """Return what this costs more than another."""
        return Cost(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def cost_of(rehearsal: Rehearsal) -> Cost:
    """Return the cost of an iteration for the kind of rank with most work. All of the iteration was rehearsed."""
    return max((_rank_cost(rehearsal, rank) for rank in rehearsal.ranks), key=lambda cost: cost.seconds)


def _rank_cost(rehearsal: Rehearsal, rank: RankRehearsal) -> Cost:
    flops = host = collective = memory = seconds = 0.0
    for name, counts in rank.counts.watcher.phases.items():
        if name == BUILD:
            continue
        repetitions = rehearsal.repetitions(name)
        flops += repetitions * sum(counts.product_flops.values())
        host += repetitions * sum(total.bytes for total in counts.copies.values())
        collective += repetitions * sum(total.bytes for total in counts.transfers.values())
        memory += repetitions * (counts.bytes_read + counts.bytes_written)
        seconds += repetitions * _serial_seconds(rehearsal, counts)
    return Cost(flops, host, collective, memory, seconds * _with_bubble(rehearsal, rank))


def _serial_seconds(rehearsal: Rehearsal, counts: PhaseCounts) -> float:
    """Return the time of a phase if arithmetic, memory, links, copies and launches follow each other."""
    return sum(vars(bound_of(counts, rehearsal.hardware, rehearsal.gpus_per_node)).values())


def _with_bubble(rehearsal: Rehearsal, rank: RankRehearsal) -> float:
    """Return the factor by which the pipeline's bubble lengthens a step: 1 + (stages - 1) / micro-batches."""
    per_step = max(1.0, rank.counts.micro_batches / rehearsal.config.minibatches)
    return 1 + (rehearsal.layout.pipeline - 1) / per_step
