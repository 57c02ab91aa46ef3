"""One kind of state of one role: its storages move to the host and back, and tensors keep their storages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icegrt.errors import RunError
from icegrt.residency.copies import Copies
from icegrt.residency.host_memory import HostMemory


@dataclass
class _Slot:
    """A storage and its copy on the host.

    Attributes:
        storage: on the device; 0 bytes while it is released.
        nbytes: its size on the device.
        host: its copy, [nbytes] uint8; None before the first release, and if its content is not kept.
        version: of the state in `host`; None: it holds nothing.
    """

    storage: torch.UntypedStorage
    nbytes: int
    host: Tensor | None = None
    version: int | None = None

    def release(self, version: int, copies: Copies) -> None:
        if self.host is not None and self.version != version:
            self.version = None
            copies.to_host(self.host, _content(self.storage))
            self.version = version
        self.storage.resize_(0)

    def fill(self, copies: Copies) -> None:
        if self.storage.nbytes():
            return
        self.storage.resize_(self.nbytes)
        content = _content(self.storage)
        if self.host is None:
            content.zero_()
        else:
            copies.to_device(content, self.host)


class Part:
    """The storages of one kind of state of one role.

    `release` copies them to the host and resizes them to 0 bytes, `fill` does the reverse. Views and contiguous buffers
    stay valid, because no tensor changes its storage. A released tensor must not be read. `prefetch` begins what a
    later `fill` completes.

    All may be called again after they have failed. The state is then complete: each storage is on the device, or its
    copy is on the host.

    Args:
        name: of the part, for messages.
        tensors: returns the tensors of this part; it is called before a release. Two tensors may share a storage.
        host: where the copies are. They are allocated at the first release and kept.
        version: counts the changes of the state; a state with the version of its copy is not copied again. None: the
            content is not kept, and a filled storage holds zeros.
    """

    def __init__(
        self, name: str, tensors: Callable[[], Iterable[Tensor]], host: HostMemory, version: Callable[[], int] | None
    ) -> None:
        self.name = name
        self._tensors, self._host, self._version = tensors, host, version
        self._slots: dict[int, _Slot] = {}
        self._is_resident = True
        self._is_arriving = False  # all copies to the device have begun; the computation has not waited for them
        # Marks behind the last copies to the host and to the device.
        self._left: Any = None
        self._arrived: Any = None

    @property
    def is_resident(self) -> bool:
        """Whether all storages are on the device, and the computation may use them."""
        return self._is_resident

    @property
    def is_kept(self) -> bool:
        """Whether the content returns with the storages; without, they are zeros."""
        return self._version is not None

    def release(self) -> None:
        """Free the device memory of the part.

        Raises:
            RunError: the host has too little memory for the copies; nothing is released then.
        """
        copies = self._host.copies
        if self._is_resident:
            self._slots = self._present_slots()
            self._reserve()
        elif self._arrived is not None:
            copies.wait(self._arrived)  # it may be on its way
        self._is_resident, self._is_arriving, self._arrived = False, False, None
        present = [slot for slot in self._slots.values() if slot.storage.nbytes()]
        if not present:
            return
        version = self._version() if self._version is not None else 0
        copies.begin_to_host()
        try:
            for slot in present:
                slot.release(version, copies)
        finally:
            self._left = copies.mark_to_host()

    def prefetch(self) -> bool:
        """Begin to bring the part back to the device, for a later `fill`; do nothing if it is there.

        Returns:
            Whether the device has the memory. If not, nothing of the part stays there.
        """
        if self._is_resident or self._is_arriving:
            return True
        try:
            self._begin_fill()
        except RuntimeError:  # torch.OutOfMemoryError on a GPU
            self.release()
            return False
        return True

    def fill(self) -> None:
        """Bring the part back to the device.

        Raises:
            RunError: the device has too little memory; what is missing there is still on the host.
        """
        if self._is_resident:
            return
        try:
            if not self._is_arriving:
                self._begin_fill()
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            missing = sum(slot.nbytes for slot in self._slots.values() if not slot.storage.nbytes())
            raise RunError(
                f"offloading: {self.name}: {missing:,} bytes do not fit on the device ("
                f"{str(error).splitlines()[0]}); lower ppo.token_budget or ppo.max_batch, or offload more by "
                "ppo.offload"
            ) from None
        self._host.copies.wait(self._arrived)
        self._is_resident, self._is_arriving, self._arrived = True, False, None

    def _begin_fill(self) -> None:
        """Begin the copies of the storages that are not on the device."""
        copies = self._host.copies
        copies.begin_to_device(self._left)
        try:
            for slot in self._slots.values():
                slot.fill(copies)
        finally:
            self._arrived = copies.mark_to_device()
        self._is_arriving = True

    def _present_slots(self) -> dict[int, _Slot]:
        """Return a slot for each storage of the part, with the copies that earlier releases have allocated."""
        slots: dict[int, _Slot] = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage._cdata not in slots:
                slots[storage._cdata] = self._slots.get(storage._cdata) or _Slot(storage, storage.nbytes())
        return slots

    def missing_copies(self) -> list[_Slot]:
        """Return the slots without a copy on the host, of those whose content is kept."""
        return [slot for slot in self._slots.values() if slot.host is None] if self._version is not None else []

    def _reserve(self) -> None:
        """Allocate the copies that are missing, as one block of the host."""
        missing = self.missing_copies()
        for slot, block in zip(missing, self._host.allocate_each([slot.nbytes for slot in missing]), strict=True):
            slot.host = block


def _content(storage: torch.UntypedStorage) -> Tensor:
    """Return the bytes of a storage, as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
