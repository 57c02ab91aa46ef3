"""A lower bound of a phase's time from its counts and the hardware's peaks. It is no measurement and no prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from icegrt.rehearsal.counts import PhaseCounts, Transfer
from icegrt.rehearsal.hardware import Hardware

ASSUMPTIONS = (
    "Every unit works at the maker's peak, and arithmetic, memory, links, copies and launches overlap completely: the "
    "bound is the slowest of them.",
    "Every operator reads its operands from device memory and writes its results there, once each.",
    "Collectives move the bytes of the best ring or tree; every GPU has a network adapter of its own.",
    "A launch takes the host the stated time; Python and PyTorch take several times more.",
    "Waits for slower ranks, the pipeline's bubble, reward functions, files and the tokenizer are left out.",
)


@dataclass(frozen=True)
class Bound:
    """Seconds of each unit; none of them can take less."""

    arithmetic: float
    memory: float
    links: float
    host_copies: float
    launches: float

    @property
    def seconds(self) -> float:
        """The largest part."""
        return max(vars(self).values())

    @property
    def limit(self) -> str:
        """The name of the largest part."""
        return max(vars(self), key=lambda name: vars(self)[name]).replace("_", " ")

    def times(self, factor: float) -> Bound:
        """Return the bound of `factor` such phases."""
        return Bound(*(seconds * factor for seconds in vars(self).values()))


def bound_of(counts: PhaseCounts, hardware: Hardware, gpus_per_node: int) -> Bound:
    """Return the bound of one phase on one rank."""
    arithmetic = sum(flops / hardware.flops_of(dtype) for dtype, flops in counts.product_flops.items())
    arithmetic += counts.vector_flops / hardware.fp32_flops
    node = network = 0.0
    for transfer, total in counts.transfers.items():
        inside, outside = wire_bytes(transfer, total.bytes, gpus_per_node)
        node, network = node + inside, network + outside
    copied = Counter[str]()
    for copy, total in counts.copies.items():
        copied[copy.direction] += total.bytes
    return Bound(
        arithmetic=arithmetic,
        memory=(counts.bytes_read + counts.bytes_written) / hardware.memory_bandwidth,
        links=max(node / hardware.link_bandwidth, network / hardware.network_bandwidth),
        host_copies=max(copied.values(), default=0) / hardware.host_bandwidth,
        launches=counts.launched * hardware.launch_seconds,
    )


def wire_bytes(transfer: Transfer, size: int, gpus_per_node: int) -> tuple[float, float]:
    """Return the bytes that a GPU must send at least, to GPUs of its node and over the network.

    With n ranks on m nodes, and S bytes of the tensor that is complete at the end (or the start):

        all-gather, reduce-scatter: S (n - 1) / n        all-reduce: twice that        broadcast, messages: S

    Over the network the n / m ranks of a node share what their node must send: S (m - 1) / m.
    """
    nodes = _nodes(transfer.ranks, gpus_per_node)
    n, m = len(transfer.ranks), len(nodes)
    if n == 1 or transfer.op in ("barrier", "receive"):  # a message counts where it is sent
        return 0.0, 0.0
    if transfer.op == "send":
        return (0.0, float(size)) if m > 1 else (float(size), 0.0)
    factor = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}.get(transfer.op)
    if factor is None:
        return (0.0, size * m / n) if m > 1 else (float(size), 0.0)
    if m == 1:
        return factor * size * (n - 1) / n, 0.0
    per_node = n / m
    return factor * size * (per_node - 1) / per_node, factor * size * (m - 1) / m / per_node


def _nodes(ranks: Sequence[int], gpus_per_node: int) -> set[int]:
    return {rank // gpus_per_node for rank in ranks}
