"""Batched decoding over the actor's own Megatron weights: prefill once per prompt, then one token per live sequence.

A wave of sequences starts together and the finished ones leave the batch. Sampling is layout-invariant: the noise of a
token depends on (seed, sequence id, position, vocabulary id) alone, never on who shares the batch.

Over a pipeline a wave is as many micro-groups as there are ranks: while one group's hidden states are with the next
rank, this rank works on another group. Every rank of the pipeline runs the same steps and yields the same responses;
logits exist on the last stage only, cut over the tensor-parallel ranks.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from itertools import pairwise

import torch

from icegrt.errors import DataError
from icegrt.model.language_model import LanguageModel
from icegrt.rollout.decode_batch import DecodeBatch, Pair
from icegrt.rollout.pipeline import PipelineChannel
from icegrt.rollout.types import Response, Sampling, Sequence


class Decoder:
    """Draws answers from a model. `stop_ids` end an answer; `max_batch` sequences are decoded at once."""

    def __init__(self, model: LanguageModel, stop_ids: abc.Sequence[int], max_batch: int = 256) -> None:
        if not stop_ids:
            raise DataError("the tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token")
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.max_batch = max_batch

    @torch.no_grad()
    def stream(
        self,
        prompts: abc.Sequence[list[int]],
        samples: int,
        sampling: Sampling,
        first_sequence_id: int = 0,
        pairs: abc.Sequence[Pair] | None = None,
    ) -> Iterator[Response]:
        """Yield every response as soon as it is finished; sample s of prompt p has id first + p * samples + s.

        `pairs`: which (prompt, sample) to draw; None draws all.
        """
        self._check(prompts, sampling)
        pending = [(p, s) for p in range(len(prompts)) for s in range(samples)] if pairs is None else list(pairs)
        for start in range(0, len(pending), self.max_batch):
            batch = [
                Sequence(p, s, first_sequence_id + p * samples + s, prompts[p])
                for p, s in pending[start : start + self.max_batch]
            ]
            yield from self._run(batch, sampling)

    def _run(self, batch: list[Sequence], sampling: Sampling) -> Iterator[Response]:
        parameter = next(self.model.parameters())
        interleaved = len(self.model.chunks) > 1
        channel = PipelineChannel(self.model.config.hidden_size, parameter.dtype, parameter.device, interleaved)
        cuts = [len(batch) * i // channel.stages for i in range(channel.stages + 1)]
        decode_batches = [
            DecodeBatch(self.model, self.stop_ids, batch[a:b], sampling, channel) for a, b in pairwise(cuts) if b > a
        ]
        chunks = range(len(self.model.chunks))
        for chunk in chunks:
            for decode_batch in decode_batches:
                decode_batch.forward(chunk)
        while decode_batches:
            for decode_batch in decode_batches:
                yield from decode_batch.process_sampled_tokens()
                if decode_batch.live:
                    decode_batch.forward(0)
            decode_batches = [decode_batch for decode_batch in decode_batches if decode_batch.live]
            for chunk in chunks[1:]:
                for decode_batch in decode_batches:
                    decode_batch.forward(chunk)
        channel.finish()

    def _check(self, prompts: abc.Sequence[list[int]], sampling: Sampling) -> None:
        context = self.model.architecture.context_length
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise DataError(f"prompt {index} is empty: nothing predicts its first token")
            if len(prompt) + sampling.max_new_tokens > context:
                raise DataError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} that "
                    f"exceeds the model's context of {context}"
                )
