"""Sequences that travel through the pipeline together: their scheduler, their blocks and the arrays of their steps.

A rank without a pipeline has one group. With a pipeline there are as many groups as stages: while the next stage works
on one, this stage works on another.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icegrt.kernels import copy_blocks
from icegrt.rollout.sampler import StepSettings
from icegrt.rollout.sequence import Sequence
from icegrt.rollout.stage import DecodeStage, StepRows
from icegrt.rollout.step_arrays import StepArrays, StepSize
from icegrt.scheduling import BlockScheduler, StepPlan

# Attention's launch depends on the longest length, rounded up to a power of two: few CUDA graphs serve all lengths.
_SHORTEST_SPAN = 256


@dataclass(eq=False)
class Step:
    """A planned step that is not complete.

    Attributes:
        size: numbers of entries, with padding.
        rows: how its rows are placed and attend.
        settings: of its samples.
        samples: the sampling sequences, in order.
        host: [2, N] int64 tokens, and fp32 log-probs in their place, on the host; valid after `event`.
        event: of the copy to the host; None: the copy is complete.
    """

    size: StepSize
    rows: StepRows
    settings: StepSettings
    samples: list[Sequence]
    host_token_N: Tensor | None = None
    host_logprob_N: Tensor | None = None
    event: torch.cuda.Event | None = None


class MicroGroup:
    """A scheduler over a part of the cache's blocks, and the static arrays of its steps on the device.

    Args:
        scheduler: over the part's blocks.
        blocks: [2 layers, n_blocks, kv_heads, block_size, head_dim], the part of the cache.
        stages: this rank's pipeline stages over the part.
        max_sequences: sequences of a step.
        max_rows: rows of a step.
        buckets: sizes that steps of decodes alone are padded to; empty: none is.
        lookahead: steps that are planned before an earlier one is complete, 0 or 1.
    """

    def __init__(
        self,
        scheduler: BlockScheduler,
        blocks: Tensor,
        stages: list[DecodeStage],
        *,
        max_sequences: int,
        max_rows: int,
        buckets: list[int],
        lookahead: int,
    ) -> None:
        device = blocks.device
        self.scheduler, self.blocks, self.stages = scheduler, blocks, stages
        self.steps: deque[Step] = deque()
        self.max_sequences, self.lookahead = max_sequences, lookahead
        self._buckets = buckets
        slots, self._columns = scheduler.block_table.shape
        options = {"device": device, "copies": lookahead + 1, "dummy_slot": slots}
        # Steps of decodes alone have arrays of their own: their copy to the device is short.
        self._decode_arrays = StepArrays(max_sequences, max_sequences, **options)
        self._mixed_arrays = StepArrays(max_rows, max_sequences, **options)
        # On a CPU the kernels read the scheduler's own table, which it changes between two steps.
        self._shares_table = device.type == "cpu" and lookahead == 0
        if self._shares_table:
            self.block_tables = torch.from_numpy(scheduler.block_table)
        else:
            self._table = torch.zeros(slots * self._columns, dtype=torch.int32, device=device)
            self.block_tables = self._table.view(slots, self._columns)
        # The newest token of every row of the table; the last entry is that of padding.
        self.newest = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.token_N = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self.logprob_N = torch.zeros(max_sequences, dtype=torch.float32, device=device)
        self._recent_S = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._recent32_S = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._zero = torch.zeros(1, dtype=torch.int32, device=device)
        self._is_unknown_S = torch.zeros(max_sequences, dtype=torch.bool, device=device)
        pin = device.type != "cpu" and torch.cuda.is_available()
        self._host_results = [
            (
                torch.zeros(max_sequences, dtype=torch.int64, pin_memory=pin),
                torch.zeros(max_sequences, dtype=torch.float32, pin_memory=pin),
            )
            for _ in range(lookahead + 1)
        ]
        self._results = 0

    def prepare(self, plan: StepPlan, sequence_ids: list[int]) -> tuple[StepSize, StepRows]:
        """Copy a plan to the device, and bring block tables and shared blocks up to date.

        Args:
            plan: of the group's scheduler.
            sequence_ids: of its samples, the keys of the sampler's noise.
        """
        size = self._padded(StepSize.of(plan))
        arrays = self._arrays(size)
        arrays.load(plan, sequence_ids, size)
        tensors = arrays.tensors
        self._update_table(plan, tensors)
        if len(plan.copy_from_C):
            count = len(plan.copy_from_C)
            copy_blocks(self.blocks, tensors["copy_from_C"][:count], tensors["copy_to_C"][:count])
        span = max(_SHORTEST_SPAN, 1 << (int(plan.lengths_S.max()) - 1).bit_length())
        capacity = self._columns * self.scheduler.block_size
        rows, sequences = size.rows, size.sequences
        return size, StepRows(
            tensors["tokens_T"][:rows],
            tensors["positions_T"][:rows],
            tensors["cache_slots_T"][:rows],
            tensors["lengths_S"][:sequences],
            tensors["table_rows_S"][:sequences],
            None if size.only_decodes else tensors["row_starts"][: sequences + 1],
            self.block_tables,
            min(span, capacity),
        )

    def fill_tokens(self, rows: StepRows) -> None:
        """Replace tokens that the host did not know by those that the device has sampled."""
        if not self.lookahead:
            return
        # Decodes come first, with one row each; tokens of prompts are known.
        count = rows.lengths_S.shape[0]
        tokens = rows.tokens_T[:count]
        torch.index_select(self.newest, 0, rows.table_rows_S, out=self._recent_S[:count])
        self._recent32_S[:count].copy_(self._recent_S[:count])
        torch.lt(tokens, self._zero, out=self._is_unknown_S[:count])
        torch.where(self._is_unknown_S[:count], self._recent32_S[:count], tokens, out=tokens)

    def sample_keys(self, size: StepSize) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows, table rows, ids and positions of a step's samples, [N] each, on the device."""
        tensors = self._arrays(size).tensors
        names = ("sample_rows_N", "sample_slots_N", "sample_ids_N", "sample_positions_N")
        rows, slots, ids, positions = (tensors[name][: size.samples] for name in names)
        return rows, slots, ids, positions

    def host_results(self, count: int) -> tuple[Tensor, Tensor]:
        """Return host buffers for a step's tokens and log-probs, in turn."""
        self._results = (self._results + 1) % len(self._host_results)
        token_N, logprob_N = self._host_results[self._results]
        return token_N[:count], logprob_N[:count]

    def _arrays(self, size: StepSize) -> StepArrays:
        return self._decode_arrays if size.only_decodes else self._mixed_arrays

    def _padded(self, size: StepSize) -> StepSize:
        if not size.only_decodes or not self._buckets:
            return size
        bucket = min(b for b in self._buckets if b >= size.rows)
        return StepSize(bucket, bucket, bucket)

    def _update_table(self, plan: StepPlan, tensors: dict[str, Tensor]) -> None:
        count = len(plan.update_entries_U)
        if self._shares_table or not count:
            return
        if count <= self._decode_arrays.updates:
            entries, blocks = tensors["update_entries_U"][:count], tensors["update_blocks_U"][:count]
        else:  # a long prompt with many samples
            host = (torch.from_numpy(x.copy()) for x in (plan.update_entries_U.astype(np.int64), plan.update_blocks_U))
            entries, blocks = (x.to(self._table.device, non_blocking=True) for x in host)
        self._table.index_copy_(0, entries, blocks)
