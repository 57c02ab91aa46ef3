"""The scheduling of one static batch: prefill all sequences, then decode until every sequence is finished.

Finished sequences leave the batch between decode steps; no sequence joins it. The scheduler holds no tensors, so it can
be replaced by another policy or implementation.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from itertools import groupby

from icegrt.rollout.sequence import Sequence

# Prompt tokens of one prefill: its activations stay small beside the KV cache.
_PREFILL_TOKENS = 8192


class Scheduler:
    """Tracks which sequences of a static batch wait, run or are finished.

    `schedule_prefill` admits all sequences at once. After each forward pass `record` appends the sampled tokens, and
    `remove` drops the finished sequences. The caller limits the size of the batch (`max_batch`) and of the KV cache.

    Args:
        sequences: sequences to run. Sequences of one prompt share its prefill if they are neighbours.
        stop_ids: token ids that end a sequence.
        max_new_tokens: number of sampled tokens that ends a sequence.

    Attributes:
        waiting: sequences without a prefill, in order.
        running: sequences in the KV cache; `running[i]` is in slot i.
    """

    def __init__(self, sequences: abc.Sequence[Sequence], stop_ids: frozenset[int], max_new_tokens: int) -> None:
        self.waiting = list(sequences)
        self.running: list[Sequence] = []
        self.stop_ids = stop_ids
        self.max_new_tokens = max_new_tokens

    def schedule_prefill(self) -> list[list[list[Sequence]]]:
        """Move the waiting sequences to the running ones.

        Returns:
            Batches for one forward pass each; a batch lists for every distinct prompt its sequences.
        """
        admitted, self.waiting = self.waiting, []
        self.running += admitted
        prompts = [list(sequences) for _, sequences in groupby(admitted, key=lambda s: s.prompt_index)]
        return list(_split(prompts, _PREFILL_TOKENS))

    def record(self, tokens: abc.Sequence[int], logprobs: abc.Sequence[float]) -> list[int]:
        """Append one sampled token to every running sequence.

        Returns:
            The slots of the sequences that this token finished, ascending.
        """
        finished = []
        for slot, (sequence, token, logprob) in enumerate(zip(self.running, tokens, logprobs, strict=True)):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if token in self.stop_ids:
                sequence.finish_reason = "stop"
            elif len(sequence.tokens) == self.max_new_tokens:
                sequence.finish_reason = "length"
            if sequence.finish_reason is not None:
                finished.append(slot)
        return finished

    def remove(self, slots: abc.Sequence[int], moves: abc.Sequence[tuple[int, int]]) -> None:
        """Remove finished sequences.

        Args:
            slots: their slots.
            moves: (from, to) copies of slots that the KV cache made, in order: it fills a freed slot with the last used
                one, so that used slots stay a prefix.
        """
        for origin, target in moves:
            self.running[target] = self.running[origin]
        del self.running[len(self.running) - len(slots) :]


def _split(prompts: list[list[Sequence]], max_tokens: int) -> Iterator[list[list[Sequence]]]:
    batch: list[list[Sequence]] = []
    total = 0
    for sequences in prompts:
        length = len(sequences[0].prompt)
        if batch and total + length > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(sequences)
        total += length
    if batch:
        yield batch
