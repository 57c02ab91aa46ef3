"""The scheduler of paged continuous batching: which rows a decoder computes in each step, and where their keys go.

Sequences wait, run and finish independently of each other. A step has one row for every sequence that decodes, and
chunks of prompts in the rest of its token budget. The samples of a prompt share its blocks; a shared block is copied
before a sequence writes into it. Full blocks are found again by their tokens (prefix reuse). If the cache is full, the
sequence that started last gives its blocks back and is computed again later.

Source of the paged cache: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023. Chunked prompts: Agrawal et al., "Sarathi-Serve", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from icegrt import _C

# The token of a row whose value only the device knows yet: it was sampled by a step that is not complete.
ON_DEVICE = -1


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step of a decoder: T rows of S sequences, N of which sample a token. Arrays are int32 unless noted.

    The arrays are views of the scheduler's own, valid until its next `plan()`. Decoding sequences come first, with one
    row each; chunks of prompts follow.

    Attributes:
        n_decodes: number of sequences with one row; they are the first of the S.
        tokens_T: token ids; `ON_DEVICE` if the token was sampled by a step that is not complete.
        positions_T: positions in the sequences.
        cache_slots_T: where a row's key and value go: block * block_size + offset.
        row_starts: [S + 1], the rows of sequence s are row_starts[s] to row_starts[s + 1].
        lengths_S: tokens that the last row of each sequence attends to, its own included.
        table_rows_S: row of the block table of each sequence.
        sample_rows_N: rows whose hidden state predicts a token; samples of one prompt repeat its last row.
        sample_slots_N: row of the block table of the sampling sequence: where the device keeps its newest token.
        sample_positions_N: position of the sampled token.
        sample_ids_N: int64, id of the sampling sequence.
        copy_from_C, copy_to_C: blocks to copy before the step writes. All are read before any is written.
        update_entries_U, update_blocks_U: changed entries of the flattened block table, and their new blocks.
    """

    n_decodes: int
    tokens_T: np.ndarray
    positions_T: np.ndarray
    cache_slots_T: np.ndarray
    row_starts: np.ndarray
    lengths_S: np.ndarray
    table_rows_S: np.ndarray
    sample_rows_N: np.ndarray
    sample_slots_N: np.ndarray
    sample_positions_N: np.ndarray
    sample_ids_N: np.ndarray
    copy_from_C: np.ndarray
    copy_to_C: np.ndarray
    update_entries_U: np.ndarray
    update_blocks_U: np.ndarray

    @property
    def n_rows(self) -> int:
        """Number of rows, T. 0: nothing can run until a planned step completes."""
        return len(self.tokens_T)


class BlockScheduler:
    """Schedules sequences over the blocks of a KV cache. It holds no tensors and knows no model.

    The order of calls is `submit`, then `plan` and `complete` in turn until `n_unfinished` is 0. A second step may be
    planned before the first completes: the device then never waits for the host.

    Args:
        n_blocks: blocks of the cache.
        block_size: tokens per block, a power of two.
        max_sequences: sequences that hold blocks at a time: rows of the block table.
        max_length: tokens of a sequence, prompt and response.
        token_budget: rows of a step; at least `max_sequences`.
        order: which waiting sequence starts first: "first_come", or the one with the most tokens left to sample.
        reuse_prefixes: whether sequences reuse cached blocks with the same tokens.

    Raises:
        ValueError: a size is below 1, `block_size` not a power of two, or `token_budget` below `max_sequences`.
    """

    def __init__(
        self,
        n_blocks: int,
        block_size: int = 16,
        *,
        max_sequences: int = 256,
        max_length: int = 4096,
        token_budget: int = 8192,
        order: Literal["first_come", "longest_remaining"] = "first_come",
        reuse_prefixes: bool = True,
    ) -> None:
        if order not in ("first_come", "longest_remaining"):
            raise ValueError(f"order: expected 'first_come' or 'longest_remaining', got {order!r}")
        longest_first = order == "longest_remaining"
        self._scheduler = _C.BlockScheduler(
            n_blocks, block_size, max_sequences, max_length, token_budget, longest_first, reuse_prefixes
        )
        self.n_blocks, self.block_size = n_blocks, block_size

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(self, ids: int | Sequence[int], prompt: Sequence[int] | np.ndarray, max_new_tokens: int) -> None:
        """Add the samples of one prompt. They share its blocks.

        Args:
            ids: id of the sequence, or of every sample; not in use.
            prompt: token ids, at least one.
            max_new_tokens: sampled tokens after which a sequence ends.

        Raises:
            ValueError: an id is in use, the prompt is empty, or the sequence would not fit the cache or `max_length`
                even alone.
        """
        tokens = np.ascontiguousarray(prompt, dtype=np.int32)
        self._scheduler.submit([ids] if isinstance(ids, int) else list(ids), tokens, max_new_tokens)

    def abort(self, sequence_id: int) -> np.ndarray:
        """Stop a sequence and free its blocks. Samples of planned steps are dropped.

        Returns:
            Its known tokens, the prompt included, int32.

        Raises:
            ValueError: there is no such sequence, or it is finished.
        """
        self._scheduler.abort(sequence_id)
        return self.tokens(sequence_id)

    def resume(self, sequence_id: int) -> None:
        """Let an aborted sequence go on from its last token; what is no longer cached is computed again.

        Raises:
            ValueError: there is no such sequence, or it is not aborted.
        """
        self._scheduler.resume(sequence_id)

    def remove(self, sequence_id: int) -> np.ndarray:
        """Forget a finished or aborted sequence.

        Returns:
            Its tokens, the prompt included, int32.

        Raises:
            ValueError: there is no such sequence, or it still runs.
        """
        tokens = self.tokens(sequence_id)
        self._scheduler.remove(sequence_id)
        return tokens

    def tokens(self, sequence_id: int) -> np.ndarray:
        """Return the known tokens of a sequence, the prompt included, int32."""
        return self._scheduler.tokens(sequence_id)

    def is_finished(self, sequence_id: int) -> bool:
        """Return whether a sequence has ended."""
        return self._scheduler.is_finished(sequence_id)

    # -- steps -----------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """Plan the next step. Its samples are reported by `complete`, in the order of the plans."""
        return StepPlan(**self._scheduler.plan())

    def complete(self, token_N: np.ndarray, finished_N: np.ndarray) -> int:
        """Report the tokens that the oldest incomplete step sampled.

        Args:
            token_N: int32 token ids in the order of the plan's samples.
            finished_N: bool, whether the token ends its sequence. `max_new_tokens` ends it too.

        Returns:
            The number of sequences that ended.

        Raises:
            ValueError: no step is incomplete, or the number of samples differs.
        """
        return self._scheduler.complete(token_N, finished_N.view(np.uint8))

    def forget_cache(self) -> None:
        """Forget all cached keys and values, after a change of weights. Running sequences are computed again.

        Raises:
            ValueError: a planned step is incomplete.
        """
        self._scheduler.forget_cache()

    # -- state -----------------------------------------------------------------------------------------------------

    @property
    def block_table(self) -> np.ndarray:
        """The block table, [max_sequences, blocks of the longest sequence] int32; a view."""
        return self._scheduler.block_table

    @property
    def n_running(self) -> int:
        """Sequences that hold blocks."""
        return self._scheduler.n_running

    @property
    def n_waiting(self) -> int:
        """Sequences that wait for blocks, without the samples that follow another one of their prompt."""
        return self._scheduler.n_waiting

    @property
    def n_unfinished(self) -> int:
        """Sequences that run or wait."""
        return self.n_running + self.n_waiting

    @property
    def n_incomplete_steps(self) -> int:
        """Planned steps without a `complete`."""
        return self._scheduler.n_in_flight

    @property
    def blocks_available(self) -> int:
        """Blocks that a sequence can take: free ones, and unreferenced ones with reusable content."""
        return self._scheduler.blocks_available

    def stats(self) -> dict[str, int]:
        """Return counts since the start.

        Returns:
            prompt_tokens: computed for sequences without a sampled token. reused_tokens: found in the cache by their
            content. shared_tokens: computed for another sample of the prompt. recomputed_tokens: computed again after a
            preemption, an abort or a change of weights. preemptions. copies: of shared blocks.
        """
        return self._scheduler.stats()
