"""A plain Python scheduler of decode steps over a paged cache: the alternative in bench_scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class _Sequence:
    slot: int
    tokens: list[int]
    max_length: int
    computed: int
    blocks: list[int] = field(default_factory=list)


class PythonScheduler:
    """Plans decode steps of sequences whose prompts are computed. It neither shares nor preempts."""

    def __init__(self, n_blocks: int, block_size: int, max_sequences: int, max_length: int) -> None:
        self.block_size = block_size
        self.free = list(range(n_blocks - 1, -1, -1))
        self.running: list[_Sequence] = []
        self.block_table = np.zeros((max_sequences, -(-max_length // block_size)), np.int32)
        self.tokens, self.positions, self.cache_slots, self.lengths = (
            np.zeros(max_sequences, np.int32) for _ in "1234"
        )

    def add(self, prompt: list[int], max_new_tokens: int) -> None:
        """Add a sequence that has all but the last token of its prompt in the cache."""
        slot = len(self.running)
        sequence = _Sequence(slot, list(prompt), len(prompt) + max_new_tokens, len(prompt) - 1)
        while len(sequence.blocks) * self.block_size < sequence.computed:
            self._add_block(sequence)
        self.running.append(sequence)

    def _add_block(self, sequence: _Sequence) -> None:
        self.block_table[sequence.slot, len(sequence.blocks)] = self.free[-1]
        sequence.blocks.append(self.free.pop())

    def plan(self) -> int:
        """Write the rows of a step; return their number."""
        size = self.block_size
        for row, sequence in enumerate(self.running):
            position = sequence.computed
            if position == len(sequence.blocks) * size:
                self._add_block(sequence)
            self.tokens[row] = sequence.tokens[position]
            self.positions[row] = position
            self.cache_slots[row] = sequence.blocks[position // size] * size + position % size
            self.lengths[row] = position + 1
            sequence.computed += 1
        return len(self.running)

    def complete(self, tokens: np.ndarray, finished: np.ndarray) -> None:
        """Append a token to every sequence, and drop those that are finished."""
        for sequence, token, stop in zip(self.running, tokens.tolist(), finished.tolist()):
            sequence.tokens.append(token)
            if stop or len(sequence.tokens) == sequence.max_length:
                self.free.extend(sequence.blocks)
                sequence.blocks.clear()
        self.running = [sequence for sequence in self.running if sequence.blocks]
