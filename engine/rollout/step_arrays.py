"""The arrays of a step: written on the host, copied to the device in one transfer, read by its kernels.

They are allocated once. A step uses the first entries of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icegrt.scheduling import StepPlan

# Legend: T, rows; S, sequences; N, samples; C, copies of blocks; U, changes of the block table.

# (name, which capacity its size follows, int32 words of an entry); 64-bit fields first, for their alignment.
_FIELDS = (
    ("sample_ids_N", "sequences", 2),
    ("sample_slots_N", "sequences", 2),
    ("sample_positions_N", "sequences", 2),  # as the C++ sampler reads them: it allocates no wider copy
    ("update_entries_U", "updates", 2),
    ("tokens_T", "rows", 1),
    ("positions_T", "rows", 1),
    ("cache_slots_T", "rows", 1),
    ("row_starts", "starts", 1),
    ("lengths_S", "sequences", 1),
    ("table_rows_S", "sequences", 1),
    ("sample_rows_N", "sequences", 1),
    ("copy_from_C", "sequences", 1),
    ("copy_to_C", "sequences", 1),
    ("update_blocks_U", "updates", 1),
)
# What fills the entries of a padded step: rows that write nowhere and sequences without tokens.
_PADDING = {"cache_slots_T": -1}


@dataclass(frozen=True)
class StepSize:
    """Numbers of entries of a step that is padded to a bucket.

    Attributes:
        rows: T. sequences: S. samples: N.
    """

    rows: int
    sequences: int
    samples: int

    @classmethod
    def of(cls, plan: StepPlan) -> StepSize:
        """Return the size of a plan."""
        return cls(plan.n_rows, len(plan.lengths_S), len(plan.sample_rows_N))

    @property
    def only_decodes(self) -> bool:
        """Whether every row is a sequence of its own, and samples."""
        return self.rows == self.sequences == self.samples


class StepArrays:
    """Arrays for steps of up to `rows` rows and `sequences` sequences.

    Args:
        rows: most rows of a step.
        sequences: most sequences and samples of a step.
        device: of the kernels.
        copies: host buffers in turn. With 2 the host writes a step while the copy of the one before may be pending.
        dummy_slot: table row that padded samples write their token to.
    """

    def __init__(self, rows: int, sequences: int, device: torch.device, *, copies: int, dummy_slot: int) -> None:
        capacity = {"rows": rows, "sequences": sequences, "starts": sequences + 1, "updates": 2 * sequences}
        self.updates = capacity["updates"]
        self._spans: dict[str, tuple[int, int, int]] = {}
        total = 0
        for name, size, words in _FIELDS:
            self._spans[name] = (total, capacity[size], words)
            total += capacity[size] * words
        on_gpu = device.type != "cpu" and torch.cuda.is_available()
        # On a CPU one buffer is both: kernels have read a step before the host writes the next.
        on_host = device.type == "cpu"
        copies = 1 if on_host else copies
        self._host = [torch.zeros(total, dtype=torch.int32, pin_memory=on_gpu) for _ in range(copies)]
        self._arrays = [self._views_of(host.numpy()) for host in self._host]
        self.device_buffer = self._host[0] if on_host else torch.zeros(total, dtype=torch.int32, device=device)
        self.tensors = {name: self._tensor(name) for name in self._spans}
        self._padding = dict(_PADDING, sample_slots_N=dummy_slot)
        self._next = 0

    def load(self, plan: StepPlan, sequence_ids: list[int], size: StepSize) -> None:
        """Write a plan, padded to `size`, and start its copy to the device.

        Args:
            plan: of the scheduler, whose ids are its own.
            sequence_ids: of the samples, the keys of the sampler's noise.
            size: of the padded step.
        """
        arrays, host = self._arrays[self._next], self._host[self._next]
        self._next = (self._next + 1) % len(self._host)
        for name, array in arrays.items():
            source = sequence_ids if name == "sample_ids_N" else getattr(plan, name)
            count = len(source)
            if name.endswith("_U") and count > self.updates:
                continue
            array[:count] = source
            if name == "row_starts":
                continue
            wanted = {"T": size.rows, "S": size.sequences, "N": size.samples, "C": count, "U": count}[name[-1]]
            if wanted > count:
                array[count:wanted] = self._padding.get(name, 0)
        if host is not self.device_buffer:
            self.device_buffer.copy_(host, non_blocking=True)

    def _views_of(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: buffer[start : start + count * words].view(np.int64 if words == 2 else np.int32)
            for name, (start, count, words) in self._spans.items()
        }

    def _tensor(self, name: str) -> Tensor:
        start, count, words = self._spans[name]
        part = self.device_buffer[start : start + count * words]
        return part.view(torch.int64) if words == 2 else part
