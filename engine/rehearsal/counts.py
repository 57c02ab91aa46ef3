"""What the watcher counted in one phase."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from icegrt.rehearsal.sites import Site

TO_DEVICE, TO_HOST = "host to device", "device to host"


@dataclass(frozen=True)
class Copy:
    """A kind of copy between host and device.

    Attributes:
        direction: TO_DEVICE or TO_HOST.
        site: the line.
        is_pinned: the host memory is page-locked.
        is_blocking: the host waits for it. A non-blocking copy from pageable memory blocks too.
    """

    direction: str
    site: Site
    is_pinned: bool
    is_blocking: bool


@dataclass(frozen=True)
class Transfer:
    """A kind of collective or message.

    Attributes:
        op: name, for example "all-reduce".
        group: what the group is for, for example "TENSOR_MODEL_PARALLEL_GROUP".
        ranks: of the group.
    """

    op: str
    group: str
    ranks: tuple[int, ...]


@dataclass
class Total:
    """Number of events, and their bytes."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int, count: int = 1) -> None:
        """Count `count` events of `size` bytes in all."""
        self.count += count
        self.bytes += size


@dataclass
class PhaseCounts:
    """Counts of one phase on one rank.

    Attributes:
        launches: kernels by (operator, line).
        backward_launches: their part that a backward pass launches.
        syncs: waits of the host for the device by (reason, line).
        copies: between host and device.
        product_flops: of matrix products and attention, by dtype.
        recomputed_flops: their part that a backward pass computes again.
        vector_flops: of the engine's own kernels, in fp32.
        bytes_read, bytes_written: in device memory.
        transfers: collectives; bytes are those of this rank's tensors.
        host_operations: operators on host tensors, and `copy_` between host and device, by (operator, line).
        host_items: numbers read from host tensors, which wait for nothing.
        spans: moments of the device and the host ledger at which the phase began and ended (start, stop, start, stop).
    """

    launches: Counter[tuple[str, Site]] = field(default_factory=Counter)
    backward_launches: Counter[tuple[str, Site]] = field(default_factory=Counter)
    syncs: Counter[tuple[str, Site]] = field(default_factory=Counter)
    copies: dict[Copy, Total] = field(default_factory=lambda: defaultdict(Total))
    product_flops: Counter[str] = field(default_factory=Counter)
    recomputed_flops: Counter[str] = field(default_factory=Counter)
    vector_flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    transfers: dict[Transfer, Total] = field(default_factory=lambda: defaultdict(Total))
    host_operations: Counter[tuple[str, Site]] = field(default_factory=Counter)
    host_items: int = 0
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def launched(self) -> int:
        """All kernels."""
        return sum(self.launches.values())

    @property
    def synced(self) -> int:
        """All waits of the host for the device."""
        return sum(self.syncs.values())
