"""Count what moves to the host and back where roles are offloaded, and the memory that it takes there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from icegrt.distributed.cpu_backend import Patches
from icegrt.rehearsal.counts import TO_DEVICE, TO_HOST, Copy
from icegrt.rehearsal.memory import OFFLOADED
from icegrt.rehearsal.sites import current_site
from icegrt.rehearsal.watcher import Watcher
from icegrt.residency import Part
from icegrt.residency import part as parts


@contextlib.contextmanager
def counted_moves(watcher: Watcher) -> Iterator[None]:
    """Let parts release and fill storages of the meta device; copies are counted as pinned and not blocking.

    Args:
        watcher: counts copies, what is on the device, and the copies that the host keeps.
    """
    nothing = torch.empty(0, dtype=torch.uint8)

    def count(direction: str, nbytes: int) -> None:
        watcher.counts.copies[Copy(direction, current_site(), True, False)].add(nbytes)

    def reserve(part: Part) -> None:
        missing = part.missing_copies()
        for slot in missing:
            slot.host = nothing
        if missing:
            watcher.host.reserve(sum(parts.copy_sizes(missing)), OFFLOADED, current_site())

    def release(slot: parts._Slot, version: int) -> None:
        if not slot.storage.nbytes():
            return
        if slot.host is not None and slot.version != version:
            count(TO_HOST, slot.nbytes)
            slot.version = version
        watcher.device.release(slot.storage)
        slot.storage.resize_(0)

    def fill(slot: parts._Slot) -> None:
        if slot.storage.nbytes():
            return
        slot.storage.resize_(slot.nbytes)
        watcher.device.restore(slot.storage)
        if slot.host is not None:
            count(TO_DEVICE, slot.nbytes)
        else:
            watcher.counts.launches["zero_", current_site()] += 1
            watcher.counts.bytes_written += slot.nbytes

    patches = Patches()
    try:
        patches.set(Part, "_reserve", reserve)
        patches.set(parts._Slot, "release", release)
        patches.set(parts._Slot, "fill", fill)
        yield
    finally:
        patches.undo()
