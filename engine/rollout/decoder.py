"""Batched decoding with the actor's own Megatron weights: one prefill per prompt, then one token per sequence a step.

The sequences of a batch start together, and finished ones leave it. Sampling is invariant to layout and batch: the
noise of a token depends on (seed, sequence id, position, vocabulary id) alone.

Over a pipeline a batch is divided into as many micro-batches as there are ranks: while the next rank works on one, this
rank works on another. Every pipeline rank runs the same steps and yields the same responses. Logits exist on the last
stage only, sharded over the tensor-parallel ranks.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from itertools import pairwise

import torch

from icegrt.errors import DataError
from icegrt.model.pipeline_model import PipelineModel
from icegrt.rollout.kv_cache.contiguous import KVCache
from icegrt.rollout.model_runner import ModelRunner
from icegrt.rollout.pipeline import PipelineChannel
from icegrt.rollout.scheduler import Scheduler
from icegrt.rollout.sequence import Sequence
from icegrt.rollout.types import Response, Sampling

# (prompt index, sample index)
Pair = tuple[int, int]


class Decoder:
    """Samples responses from a model.

    Args:
        model: this rank's stages of the model.
        stop_ids: token ids that end a response.
        max_batch: number of sequences that are decoded together.

    Raises:
        DataError: there is no stop token.
    """

    def __init__(self, model: PipelineModel, stop_ids: abc.Sequence[int], max_batch: int = 256) -> None:
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
        """Yield every response as soon as it is finished. Sample s of prompt p has id first + p * samples + s.

        Args:
            prompts: token ids of every prompt.
            samples: number of samples per prompt.
            sampling: temperature, truncation, length and seed.
            first_sequence_id: the id of the first sample of the first prompt.
            pairs: which samples to draw, those of one prompt next to each other; None draws all.

        Raises:
            DataError: a prompt is empty, or leaves no room for the response.
        """
        self._check(prompts, sampling)
        pending = [(p, s) for p in range(len(prompts)) for s in range(samples)] if pairs is None else list(pairs)
        for start in range(0, len(pending), self.max_batch):
            sequences = [
                Sequence(p, s, first_sequence_id + p * samples + s, prompts[p])
                for p, s in pending[start : start + self.max_batch]
            ]
            yield from self._decode(sequences, sampling)

    def _decode(self, sequences: list[Sequence], sampling: Sampling) -> Iterator[Response]:
        parameter = next(self.model.parameters())
        chunks = range(len(self.model.chunks))
        group = self.model.cluster.pipeline_return_group
        channel = PipelineChannel(self.model.config.hidden_size, parameter.dtype, parameter.device, group)
        bounds = [len(sequences) * i // channel.stages for i in range(channel.stages + 1)]
        micro_batches = [
            _MicroBatch(self.model, sequences[start:stop], self.stop_ids, sampling, channel)
            for start, stop in pairwise(bounds)
            if stop > start
        ]
        # 1. Prefill: every micro-batch through every stage of this rank.
        for chunk in chunks:
            for micro_batch in micro_batches:
                micro_batch.runner.forward(chunk)
        # 2. Decode steps: a micro-batch starts its next step as soon as its tokens are known.
        while micro_batches:
            for micro_batch in micro_batches:
                yield from micro_batch.finish_step()
                if micro_batch.is_running:
                    micro_batch.runner.forward(0)
            micro_batches = [micro_batch for micro_batch in micro_batches if micro_batch.is_running]
            for chunk in chunks[1:]:
                for micro_batch in micro_batches:
                    micro_batch.runner.forward(chunk)
        channel.finish()

    def _check(self, prompts: abc.Sequence[list[int]], sampling: Sampling) -> None:
        context, vocab_limit = self.model.architecture.context_length, self.model.vocab_limit
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise DataError(f"prompt {index} is empty: nothing predicts its first token")
            if not all(0 <= token < vocab_limit for token in (min(prompt), max(prompt))):
                raise DataError(
                    f"prompt {index} names token {min(prompt) if min(prompt) < 0 else max(prompt)}, which is not in "
                    f"the vocabulary of {vocab_limit} tokens"
                )
            if len(prompt) + sampling.max_new_tokens > context:
                raise DataError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} that "
                    f"exceeds the model's context of {context}"
                )


class _MicroBatch:
    """Sequences that travel through the pipeline together, with their scheduler, KV cache and model runner."""

    def __init__(
        self,
        model: PipelineModel,
        sequences: list[Sequence],
        stop_ids: frozenset[int],
        sampling: Sampling,
        channel: PipelineChannel,
    ) -> None:
        config = model.config
        self.scheduler = Scheduler(sequences, stop_ids, sampling.max_new_tokens)
        self.cache = KVCache(
            model.layer_indices,
            len(sequences),
            max(len(s.prompt) for s in sequences) + sampling.max_new_tokens,
            config.num_query_groups // config.tensor_model_parallel_size,
            config.kv_channels,
            dtype=channel.dtype,
            device=channel.device,
        )
        self.runner = ModelRunner(model, self.cache, sampling, channel)
        self.runner.prefill(self.scheduler.schedule_prefill())

    @property
    def is_running(self) -> bool:
        """Whether a sequence is unfinished."""
        return bool(self.scheduler.running)

    def finish_step(self) -> list[Response]:
        """Record the sampled tokens and prepare the next step. Returns the responses that are finished."""
        finished = self.scheduler.record(*self.runner.collect_sampled())
        responses = [self.scheduler.running[slot].response() for slot in finished]
        self.scheduler.remove(finished, self.cache.free(finished))
        if self.is_running:
            self.runner.decode(self.scheduler.running)
        return responses
