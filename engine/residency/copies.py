"""Copies between device and host beside the computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Copies:
    """Copies between the device and host memory, in two queues; here each is complete when the call returns.

    Subclasses may return earlier. A copy then begins behind what `begin_*` of its queue has waited for. The computation
    may use, and release, what has come to the device after it has waited for a mark behind that. Memory that a copy to
    the host reads may be released at once; nothing else gets it before the copy is complete.
    """

    def begin_to_host(self) -> None:
        """Let copies to the host wait for all that the computation has begun so far."""

    def to_host(self, host: Tensor, device: Tensor) -> None:
        """Copy bytes of the device."""
        host.copy_(device)

    def mark_to_host(self) -> Any:
        """Return a mark behind the copies to the host so far."""

    def begin_to_device(self, *marks: Any) -> None:
        """Let copies to the device wait for all that the computation has begun so far, and for copies to the host."""

    def to_device(self, device: Tensor, host: Tensor) -> None:
        """Copy bytes of the host."""
        device.copy_(host)

    def mark_to_device(self) -> Any:
        """Return a mark behind the copies to the device so far."""

    def wait(self, mark: Any) -> None:
        """Let the computation wait for the copies to the device in front of a mark; the host does not wait."""


class StreamedCopies(Copies):
    """Copies on two CUDA streams, one for each direction, which order them by events. The host waits for none.

    Memory is allocated on the stream of the computation. A copy uses it on another stream, so it begins after the
    computation's last use of that memory. `record_stream` keeps what is released from reuse until it has been copied to
    the host. Copies to the device do without: the allocator, which looks at events when it is called, would not see
    them complete while the host runs ahead, and layers that follow each other would take new memory each.
    """

    def __init__(self, device: torch.device) -> None:
        self._outward, self._inward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def begin_to_host(self) -> None:
        """Let copies to the host wait for the computation."""
        self._outward.wait_event(torch.cuda.current_stream().record_event())

    def to_host(self, host: Tensor, device: Tensor) -> None:
        """Copy bytes of the device to pinned memory."""
        with torch.cuda.stream(self._outward):
            host.copy_(device, non_blocking=True)
        device.record_stream(self._outward)

    def mark_to_host(self) -> Any:
        """Return an event."""
        return self._outward.record_event()

    def begin_to_device(self, *marks: Any) -> None:
        """Let copies to the device wait for the computation and for events."""
        for event in (torch.cuda.current_stream().record_event(), *marks):
            self._inward.wait_event(event)

    def to_device(self, device: Tensor, host: Tensor) -> None:
        """Copy bytes of pinned memory to the device."""
        with torch.cuda.stream(self._inward):
            device.copy_(host, non_blocking=True)

    def mark_to_device(self) -> Any:
        """Return an event."""
        return self._inward.record_event()

    def wait(self, mark: Any) -> None:
        """Let the stream of the computation wait for an event."""
        torch.cuda.current_stream().wait_event(mark)


def copies_of(device: torch.device) -> Copies:
    """Return the copies of a device: on streams of their own on a GPU."""
    return StreamedCopies(device) if device.type == "cuda" else Copies()
