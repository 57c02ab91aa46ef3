"""One kind of state of one role: its storages move to the host and back, and tensors keep their storages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.errors import RunError
from icegrt.residency.host_memory import HostMemory

_ALIGNMENT = 64  # bytes, of a storage's copy in the host's block


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

    def release(self, version: int) -> None:
        if not self.storage.nbytes():
            return
        if self.host is not None and self.version != version:
            self.version = None
            self.host.copy_(_content(self.storage), non_blocking=True)
            self.version = version
        # The copy and later users of the memory are on one stream.
        self.storage.resize_(0)

    def fill(self) -> None:
        if self.storage.nbytes():
            return
        self.storage.resize_(self.nbytes)
        content = _content(self.storage)
        if self.host is None:
            content.zero_()
        else:
            content.copy_(self.host, non_blocking=True)


class Part:
    """The storages of one kind of state of one role.

    `release` copies them to the host and resizes them to 0 bytes, `fill` does the reverse. Views and contiguous buffers
    stay valid, because no tensor changes its storage. A released tensor must not be read.

    Both may be called again after they have failed. The state is then complete: each storage is on the device, or its
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

    @property
    def is_resident(self) -> bool:
        """Whether all storages are on the device."""
        return self._is_resident

    def release(self) -> None:
        """Free the device memory of the part.

        Raises:
            RunError: the host has too little memory for the copies; nothing is released then.
        """
        if self._is_resident:
            self._slots = self._present_slots()
            self._reserve()
        self._is_resident = False
        version = self._version() if self._version is not None else 0
        for slot in self._slots.values():
            slot.release(version)

    def fill(self) -> None:
        """Bring the part back to the device.

        Raises:
            RunError: the device has too little memory; what is missing there is still on the host.
        """
        if self._is_resident:
            return
        try:
            for slot in self._slots.values():
                slot.fill()
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            missing = sum(slot.nbytes for slot in self._slots.values() if not slot.storage.nbytes())
            raise RunError(
                f"offloading: {self.name}: {missing:,} bytes do not fit on the device ("
                f"{str(error).splitlines()[0]}); lower ppo.token_budget or ppo.max_batch, or offload more by "
                "ppo.offload"
            ) from None
        self._is_resident = True

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
        if not missing:
            return
        sizes = copy_sizes(missing)
        blocks = self._host.allocate(sum(sizes)).split(sizes)
        for slot, block in zip(missing, blocks, strict=True):
            slot.host = block[: slot.nbytes]


def copy_sizes(slots: Iterable[_Slot]) -> list[int]:
    """Return the bytes that the copies of storages take on the host."""
    return [-(-slot.nbytes // _ALIGNMENT) * _ALIGNMENT for slot in slots]


def _content(storage: torch.UntypedStorage) -> Tensor:
    """Return the bytes of a storage, as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
