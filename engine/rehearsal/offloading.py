"""Count what moves to the host and back where roles are offloaded, and the memory that it takes there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from icegrt.distributed.cpu_backend import Patches
from icegrt.rehearsal.counts import TO_DEVICE, TO_HOST, Copy
from icegrt.rehearsal.memory import OFFLOADED
from icegrt.rehearsal.sites import current_site
from icegrt.rehearsal.watcher import Watcher
from icegrt.residency import Copies, HostMemory, Part
from icegrt.residency import part as parts
from icegrt.residency.host_memory import block_offsets
from icegrt.roles import host_adam


@contextlib.contextmanager
def counted_moves(watcher: Watcher) -> Iterator[None]:
    """Let parts release and fill storages of the meta device; copies are counted as pinned and not blocking.

    An Adam on the host copies gradients and weights; what the host computes is not counted.

    Args:
        watcher: counts copies, what is on the device, and the copies that the host keeps.
    """
    nothing = torch.empty(0, dtype=torch.uint8)

    def count(direction: str, nbytes: int) -> None:
        watcher.counts.copies[Copy(direction, current_site(), True, False)].add(nbytes)

    def keep(sizes: Sequence[int]) -> None:
        if sizes:
            watcher.host.reserve(block_offsets(sizes)[-1], OFFLOADED, current_site())

    def reserve(part: Part) -> None:
        missing = part.missing_copies()
        for slot in missing:
            slot.host = nothing
        keep([slot.nbytes for slot in missing])

    def release(slot: parts._Slot, version: int, copies: Copies) -> None:
        if slot.host is not None and slot.version != version:
            count(TO_HOST, slot.nbytes)
            slot.version = version
        watcher.device.release(slot.storage)
        slot.storage.resize_(0)

    def fill(slot: parts._Slot, copies: Copies) -> None:
        if slot.storage.nbytes():
            return
        slot.storage.resize_(slot.nbytes)
        watcher.device.restore(slot.storage)
        if slot.host is not None:
            count(TO_DEVICE, slot.nbytes)
        else:
            watcher.counts.launches["zero_", current_site()] += 1
            watcher.counts.bytes_written += slot.nbytes

    def allocate(host: HostMemory, sizes: Sequence[int]) -> list[Tensor]:
        keep(sizes)
        # Tensors of the device without memory, unseen by the watcher: nothing but the copies below reads them.
        with _disable_current_modes():
            blocks = [torch.empty(size, dtype=torch.uint8, device=host.device) for size in sizes]
            for block in blocks:
                block.untyped_storage().resize_(0)
        return blocks

    def to_host(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        for _, source in copies:
            count(TO_HOST, source.numel() * source.element_size())
        watcher.record_sync("copy to the host")

    def to_device(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        for target, source in copies:
            count(TO_DEVICE, source.numel() * source.element_size())
            target.copy_(torch.empty_like(source, device=target.device))

    patches = Patches()
    try:
        patches.set(Part, "_reserve", reserve)
        patches.set(parts._Slot, "release", release)
        patches.set(parts._Slot, "fill", fill)
        patches.set(HostMemory, "allocate_each", allocate)
        patches.set(host_adam, "to_host", to_host)
        patches.set(host_adam, "to_device", to_device)
        patches.set(host_adam.HostAdam, "step_on_host", lambda adam: None)
        yield
    finally:
        patches.undo()
