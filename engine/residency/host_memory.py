"""Host memory that state of a device moves to: pinned for a GPU."""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from icegrt.errors import RunError
from icegrt.residency.copies import Copies, copies_of

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts
_ALIGNMENT = 64  # bytes, of each tensor in a block


def block_offsets(sizes: Sequence[int]) -> list[int]:
    """Return the offset of each tensor in a block, and the size of the block, in bytes."""
    return [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]


class HostMemory:
    """Memory on the host that is allocated once and kept until the object goes.

    Blocks are shared mappings of exactly the requested size (torch's allocator of pinned memory rounds up to powers of
    two). For a GPU they are registered with CUDA, so that copies run asynchronously. A process that computes on the CPU
    has the same blocks, so that what moved there is separate from its private memory.

    Args:
        device: the device whose state moves.

    Attributes:
        bytes: allocated so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._blocks: list[Tensor] = []  # they outlive the finalizers, which need their mappings

    @cached_property
    def copies(self) -> Copies:
        """The copies between it and the device."""
        return copies_of(self.device)

    def allocate_each(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return a tensor of uint8 for each size in bytes, all in one new block.

        Each has a storage of its own size: Megatron's checkpoints copy tensors whose storages are larger.

        Args:
            sizes: more than 0 each.

        Raises:
            RunError: the host has too little memory.
        """
        if not sizes:
            return []
        *offsets, nbytes = block_offsets(sizes)
        try:
            mapping = mmap.mmap(-1, nbytes)
            block = torch.frombuffer(mapping, dtype=torch.uint8)
            if self.device.type == "cuda":
                self._pin(block)
        except (OSError, MemoryError, RuntimeError) as error:
            raise RunError(
                f"offloading: {nbytes:,} bytes of host memory cannot be allocated ({error}); set ppo.offload and "
                "optimizer.on_host to keep more on the device, or give the process more memory"
            ) from None
        self.bytes += nbytes
        self._blocks.append(block)
        return [
            torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=offset)
            for size, offset in zip(sizes, offsets, strict=True)
        ]

    def _pin(self, block: Tensor) -> None:
        address, cudart = block.data_ptr(), torch.cuda.cudart()
        status = int(cudart.cudaHostRegister(address, block.nbytes, _PORTABLE))
        if status != 0:
            raise RuntimeError(f"cudaHostRegister returned {status}")
        weakref.finalize(self, cudart.cudaHostUnregister, address).atexit = False
