"""Continuous batching over a paged KV cache, with the model's own Megatron weights.

Requests join and leave between steps. A step computes one row for every running sequence and parts of prompts in the
rest of its token budget. Sampling is invariant to layout and batch: the noise of a token depends on (seed, sequence id,
position, vocabulary id) alone.

Over a pipeline the sequences are divided into as many micro-groups as there are ranks: while the next rank works on
one, this rank works on another. Every rank of a model makes the same calls and yields the same responses.
"""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Callable, Iterator

import numpy as np
import torch

from icegrt.errors import DataError
from icegrt.model.pipeline_model import PipelineModel
from icegrt.rollout.micro_group import MicroGroup, Step
from icegrt.rollout.requests import DecoderStats, Request, check_fits, check_prompt, check_sampling
from icegrt.rollout.sampler import SettingsTable
from icegrt.rollout.sequence import Sequence
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.storage import DecoderStorage
from icegrt.rollout.types import FinishReason, Response, Sampling
from icegrt.scheduling import BlockScheduler


class Decoder:
    """Samples responses from a model.

    Args:
        model: this rank's stages of the model.
        stop_ids: token ids that end a response.
        settings: sizes and policies; None takes the defaults.
        to_text: returns the text of token ids; needed by requests with stop texts.

    Raises:
        DataError: there is no stop token.
    """

    def __init__(
        self,
        model: PipelineModel,
        stop_ids: abc.Sequence[int],
        settings: RolloutSettings | None = None,
        to_text: Callable[[list[int]], str] | None = None,
    ) -> None:
        if not stop_ids:
            raise DataError("the tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token")
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.settings = settings or RolloutSettings()
        self.stats = DecoderStats()
        self.cache_summary = ""
        self._to_text = to_text
        self._storage: DecoderStorage | None = None
        self._schedulers: list[BlockScheduler] = []
        self._sequences: dict[int, Sequence] = {}  # unfinished and aborted ones by the scheduler's number
        self._home: dict[int, int] = {}  # their micro-groups
        self._requests: dict[int, Request] = {}
        self._undelivered: list[tuple[Request, Response]] = []  # finished while another call waited for a step
        self._settings_table = SettingsTable()
        self._n_requests = self._n_sequences = 0
        self._weights_version = model.weights_version

    # -- requests --------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompts: abc.Sequence[list[int]],
        samples: int,
        sampling: Sampling,
        first_sequence_id: int = 0,
        *,
        indices: abc.Sequence[int] | None = None,
        blocks_wanted: int | None = None,
    ) -> list[Request]:
        """Add prompts. Sample s of prompt p has id first + p * samples + s.

        Args:
            prompts: token ids of every prompt.
            samples: number of samples per prompt.
            sampling: of all of them.
            first_sequence_id: the id of the first sample of prompt 0.
            indices: which of the prompts to add; None: all.
            blocks_wanted: blocks of a micro-group's cache, if it is allocated now; None: as many as can be used.

        Raises:
            DataError: a prompt is empty, or leaves no room for the response, or does not fit the cache.
        """
        chosen = range(len(prompts)) if indices is None else indices
        for index in chosen:
            check_prompt(self.model, index, prompts[index], sampling)
        check_sampling(self.model, sampling, self._to_text is not None)
        self._use_current_weights()
        storage = self._ensure_storage(self._most_blocks() if blocks_wanted is None else blocks_wanted)
        for index in chosen:
            check_fits(index, prompts[index], sampling, storage.n_blocks, self.settings.block_size)
        return [
            self._add(index, prompts[index], samples, sampling, first_sequence_id + index * samples) for index in chosen
        ]

    def abort(self, requests: abc.Sequence[Request]) -> list[Response]:
        """Stop requests. Returns the responses of their unfinished samples so far, with finish reason 'abort'."""
        if not requests:
            return []
        self._drain()
        responses = []
        unfinished = [s for request in requests for s in request.sequences if s.finish_reason is None]
        for sequence in (s for s in unfinished if s.number in self._sequences):
            scheduler = self._scheduler_of(sequence)
            tokens = scheduler.abort(sequence.number)[len(sequence.prompt) :].tolist()
            self._end(sequence, "abort")
            responses.append(sequence.response(tokens))
        for request in requests:
            self._requests.pop(request.id, None)
        return responses

    def resume(self, requests: abc.Sequence[Request]) -> None:
        """Let the aborted samples of requests continue from their last token."""
        self._use_current_weights()
        self._ensure_storage(self._most_blocks())
        for request in requests:
            self._requests[request.id] = request
            for sequence in request.sequences:
                if sequence.finish_reason == "abort":
                    sequence.finish_reason = None
                    self._scheduler_of(sequence).resume(sequence.number)
                    self._settings_table.add(sequence)

    def forget(self, requests: abc.Sequence[Request]) -> None:
        """Drop aborted requests, which can then no longer be resumed."""
        for sequence in (s for request in requests for s in request.sequences if s.number in self._sequences):
            self._scheduler_of(sequence).remove(sequence.number)
            del self._sequences[sequence.number], self._home[sequence.number]
        dropped = {request.id for request in requests}
        self._undelivered = [pair for pair in self._undelivered if pair[0].id not in dropped]

    @property
    def n_unfinished(self) -> int:
        """Number of sequences that run or wait."""
        return sum(scheduler.n_unfinished for scheduler in self._schedulers)

    # -- steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[tuple[Request, Response]]:
        """Advance every micro-group by one step. Returns the responses that are finished, with their requests.

        After an exception the decoder is empty: what was under way cannot be completed.
        """
        try:
            return self._step()
        except BaseException:
            self._abandon()
            raise

    def _step(self) -> list[tuple[Request, Response]]:
        self._use_current_weights()
        storage = self._ensure_storage(1)
        finished, self._undelivered = self._undelivered, []
        started = []
        for group in storage.groups:
            # On a GPU the step before is still running: the host plans the next one meanwhile.
            while len(group.steps) > group.lookahead:
                finished += self._complete(group)
            step = self._start(group)
            if step is None:
                while group.steps:
                    finished += self._complete(group)
            else:
                started.append((group, step))
                storage.runner.forward(group, step, 0)
        for chunk in range(1, len(self.model.chunks)):
            for group, step in started:
                storage.runner.forward(group, step, chunk)
        if not self.n_unfinished:
            storage.runner.channel.finish()
        return finished

    def stream(
        self,
        prompts: abc.Sequence[list[int]],
        samples: int,
        sampling: Sampling,
        first_sequence_id: int = 0,
        take: Callable[[int], abc.Sequence[int]] | None = None,
        concurrency: int | None = None,
    ) -> Iterator[Response]:
        """Yield every response as soon as it is finished. Sample s of prompt p has id first + p * samples + s.

        An iteration that is given up, or fails, leaves no sequence behind.

        Args:
            prompts: token ids of every prompt.
            samples: number of samples per prompt.
            sampling: temperature, truncation, length and seed.
            first_sequence_id: the id of the first sample of the first prompt.
            take: returns up to that many more indices of prompts to answer, none at the end; None: all are answered.
            concurrency: sequences at a time if prompts are taken.

        Raises:
            DataError: a prompt is empty, or leaves no room for the response, or does not fit the cache.
        """
        check_sampling(self.model, sampling, self._to_text is not None)
        for index, prompt in enumerate(prompts):
            check_prompt(self.model, index, prompt, sampling)
        wanted = self._blocks_for(prompts, samples, sampling)
        open_requests: dict[int, Request] = {}
        open_samples: Counter[int] = Counter()
        is_exhausted = take is None

        def add(indices: abc.Sequence[int] | None) -> None:
            new = self.submit(prompts, samples, sampling, first_sequence_id, indices=indices, blocks_wanted=wanted)
            open_requests.update((request.id, request) for request in new)
            open_samples.update({request.id: samples for request in new})

        try:
            if take is None:
                add(None)
            while open_requests or not is_exhausted:
                room = (concurrency or self.settings.max_batch) - open_samples.total()
                if take is not None and not is_exhausted and room > 0:
                    indices = take(max(1, room // samples))
                    is_exhausted = not indices
                    add(indices)
                for request, response in self.step() if open_requests else ():
                    if request.id not in open_requests:
                        continue  # of another call
                    open_samples[request.id] -= 1
                    if not open_samples[request.id]:
                        del open_requests[request.id], open_samples[request.id]
                    yield response
        finally:
            self.abort(list(open_requests.values()))
            self.forget(list(open_requests.values()))

    # -- memory ----------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Free the cache, the activations and the graphs. Unfinished sequences are computed again afterwards."""
        self._drain()
        for scheduler in self._schedulers:
            scheduler.forget_cache()
        self._storage = None
        if not self._sequences:
            self._schedulers = []

    @property
    def storage(self) -> DecoderStorage | None:
        """What is allocated now; None after `release`, and before the first request."""
        return self._storage

    def _ensure_storage(self, blocks_wanted: int) -> DecoderStorage:
        storage = self._storage
        is_small = storage is not None and not storage.is_limited and storage.n_blocks < blocks_wanted
        if is_small and not self._sequences:
            self.release()
        if self._storage is None:
            self.model.wait_for_param_gather()
            self._storage = DecoderStorage.allocate(self.model, self.settings, blocks_wanted, self._schedulers)
            self._schedulers = [group.scheduler for group in self._storage.groups]
            self.cache_summary = self._storage.summary
        return self._storage

    def _blocks_for(self, prompts: abc.Sequence[list[int]], samples: int, sampling: Sampling) -> int:
        """Return the blocks of a micro-group that these requests can use at a time."""
        most = -(-self.settings.max_batch // self.model.cluster.layout.pipeline)
        lengths = sorted((len(prompt) for prompt in prompts), reverse=True)
        needs = [self._blocks_of(length + sampling.max_new_tokens - 1) for length in lengths[: -(-most // samples)]]
        return sum(need * samples for need in needs)

    def _most_blocks(self) -> int:
        return self.settings.max_batch * self._blocks_of(self.model.architecture.context_length)

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _start(self, group: MicroGroup) -> Step | None:
        """Plan a step of a group; None: nothing can run before an earlier step is complete."""
        if not group.scheduler.n_unfinished:
            return None
        plan = group.scheduler.plan()
        if not plan.n_rows:
            return None
        samples = [self._sequences[number] for number in plan.sample_ids_N.tolist()]
        size, rows = group.prepare(plan, [sequence.id for sequence in samples])
        vocab_size = self.model.vocab_limit
        sampled = [(s, p - len(s.prompt)) for s, p in zip(samples, plan.sample_positions_N.tolist(), strict=True)]
        settings = self._settings_table.of_step(sampled, size.samples, vocab_size, group.blocks.device)
        step = Step(size, rows, settings, samples)
        group.steps.append(step)
        self.stats.steps += 1
        self.stats.rows += plan.n_rows
        self.stats.kv_tokens_read += int(plan.lengths_S[: plan.n_decodes].sum())
        return step

    def _complete(self, group: MicroGroup) -> list[tuple[Request, Response]]:
        """Read the tokens of a group's oldest step, and end the sequences that they end."""
        assert self._storage is not None
        step = group.steps.popleft()
        token_N, logprob_N = self._storage.runner.collect(step)
        tokens, logprobs = token_N.tolist(), logprob_N.tolist()
        ends = [token in sequence.stop_ids for token, sequence in zip(tokens, step.samples, strict=True)]
        group.scheduler.complete(token_N.numpy().astype(np.int32), np.array(ends, dtype=bool))
        finished = []
        for sequence, token, logprob, is_stop in zip(step.samples, tokens, logprobs, ends, strict=True):
            if sequence.finish_reason is not None:
                continue  # it ended while this step was under way
            sequence.logprobs.append(logprob)
            sequence.versions.append(self._weights_version)
            self.stats.sampled_tokens += 1
            reason: FinishReason | None = None
            if is_stop or sequence.completes_stop(token, self._to_text):
                reason = "stop"
            elif sequence.n_sampled == sequence.sampling.max_new_tokens:
                reason = "length"
            if reason is not None:
                finished.append(self._finish(sequence, reason))
        return finished

    def _finish(self, sequence: Sequence, reason: FinishReason) -> tuple[Request, Response]:
        scheduler, number = self._scheduler_of(sequence), sequence.number
        if not scheduler.is_finished(number):  # a stop text is no concern of the scheduler
            scheduler.abort(number)
        tokens = scheduler.remove(number)[len(sequence.prompt) :].tolist()
        self._end(sequence, reason)
        del self._sequences[number], self._home[number]
        request = self._requests[sequence.request]
        response = sequence.response(tokens)
        request.responses.append(response)
        if request.is_finished:
            self._requests.pop(request.id, None)
        return request, response

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._settings_table.remove(sequence)

    def _drain(self) -> None:
        """Complete all planned steps. The next `step` returns what they finished."""
        if self._storage is not None:
            for group in self._storage.groups:
                while group.steps:
                    self._undelivered += self._complete(group)

    def _abandon(self) -> None:
        """Drop every request and all memory."""
        self._storage = None
        self._schedulers = []
        self._undelivered = []
        self._settings_table = SettingsTable()
        for table in (self._sequences, self._home, self._requests):
            table.clear()

    def _use_current_weights(self) -> None:
        """Forget what older weights have computed."""
        if self.model.weights_version == self._weights_version:
            return
        self._drain()
        for scheduler in self._schedulers:
            scheduler.forget_cache()
        self.model.wait_for_param_gather()
        if self._storage is not None:
            self._storage.refresh_weights()
        self._weights_version = self.model.weights_version

    # -- requests --------------------------------------------------------------------------------------------------

    def _add(self, index: int, prompt: list[int], samples: int, sampling: Sampling, first_sequence_id: int) -> Request:
        stop_ids = self.stop_ids.union(sampling.stop_token_ids)
        request = Request(self._n_requests, [])
        self._n_requests += 1
        home = min(range(len(self._schedulers)), key=lambda i: (self._schedulers[i].n_unfinished, i))
        for sample in range(samples):
            sequence = Sequence(
                sampling, stop_ids, request.id, index, sample, first_sequence_id + sample, prompt, self._n_sequences
            )
            self._n_sequences += 1
            request.sequences.append(sequence)
            self._sequences[sequence.number] = sequence
            self._home[sequence.number] = home
            self._settings_table.add(sequence)
        numbers = [sequence.number for sequence in request.sequences]
        self._schedulers[home].submit(numbers, prompt, sampling.max_new_tokens)
        self._requests[request.id] = request
        return request

    def _scheduler_of(self, sequence: Sequence) -> BlockScheduler:
        return self._schedulers[self._home[sequence.number]]
