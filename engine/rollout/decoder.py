"""Batched decoding over the actor's own Megatron weights: prefill once per prompt, then one token per live sequence.

A wave of sequences starts together and the finished ones leave the batch. Sampling is layout-invariant: the noise of a
token depends on (seed, sequence id, position, vocabulary id) alone, never on who shares the batch.

Over a pipeline a wave is as many micro-groups as there are ranks: while one group's hidden states are with the next
rank, this rank works on another group. Every rank of the pipeline runs the same steps and yields the same responses;
logits exist on the last stage only, cut over the tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from icegrt.errors import DataError
from icegrt.kernels import sample_tokens
from icegrt.model.attention import AttentionPlan
from icegrt.model.language_model import LanguageModel, whole_sequences
from icegrt.rollout.kv_cache.contiguous import KVCache
from icegrt.rollout.pipeline import Relay
from icegrt.rollout.types import Response, Sampling

# A prefill is cut so that its activations stay small beside the cache.
_PREFILL_TOKENS = 8192
Pair = tuple[int, int]


class Decoder:
    """Draws answers from a model. `stop_ids` end an answer; `max_batch` sequences are decoded at once."""

    def __init__(self, model: LanguageModel, stop_ids: Sequence[int], max_batch: int = 256) -> None:
        if not stop_ids:
            raise DataError("the tokenizer has no end-of-sequence token, so no answer could ever end; set eos_token")
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.max_batch = max_batch

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[list[int]],
        samples: int,
        sampling: Sampling,
        first_sequence_id: int = 0,
        pairs: Sequence[Pair] | None = None,
    ) -> Iterator[Response]:
        """Yield every response as soon as it is finished; sample s of prompt p has id first + p * samples + s.

        `pairs`: which (prompt, sample) to draw; None draws all.
        """
        self._check(prompts, sampling)
        pending = [(p, s) for p in range(len(prompts)) for s in range(samples)] if pairs is None else list(pairs)
        for start in range(0, len(pending), self.max_batch):
            wave = [
                _Member(p, s, first_sequence_id + p * samples + s, prompts[p])
                for p, s in pending[start : start + self.max_batch]
            ]
            yield from self._run(wave, sampling)

    def _run(self, wave: list[_Member], sampling: Sampling) -> Iterator[Response]:
        parameter = next(self.model.parameters())
        interleaved = len(self.model.chunks) > 1
        relay = Relay(self.model.config.hidden_size, parameter.dtype, parameter.device, interleaved)
        cuts = [len(wave) * i // relay.stages for i in range(relay.stages + 1)]
        groups = [_Group(self, wave[a:b], sampling, relay) for a, b in pairwise(cuts) if b > a]
        chunks = range(len(self.model.chunks))
        for chunk in chunks:
            for group in groups:
                group.forward(chunk)
        while groups:
            for group in groups:
                yield from group.take()
                if group.live:
                    group.forward(0)
            groups = [group for group in groups if group.live]
            for chunk in chunks[1:]:
                for group in groups:
                    group.forward(chunk)
        relay.finish()

    def _check(self, prompts: Sequence[list[int]], sampling: Sampling) -> None:
        context = self.model.architecture.context_length
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise DataError(f"prompt {index} is empty: nothing predicts its first token")
            if len(prompt) + sampling.max_new_tokens > context:
                raise DataError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} that "
                    f"exceeds the model's context of {context}"
                )


@dataclass(frozen=True)
class _Member:
    """A sequence to be drawn."""

    prompt: int
    sample: int
    id: int
    tokens: list[int]


@dataclass(frozen=True)
class _Pass:
    """Rows of one trip through the model: tokens, positions, how they attend, and which rows are sampled from."""

    tokens_T: Tensor
    positions_T: Tensor
    plan: AttentionPlan
    rows_N: Tensor | slice


class _Group:
    """Sequences that are decoded together. Slot i of the cache belongs to `members[i]`, an index into `sequences`."""

    def __init__(self, decoder: Decoder, sequences: list[_Member], sampling: Sampling, relay: Relay) -> None:
        self.model, self.stop_ids, self.sampling, self.relay = decoder.model, decoder.stop_ids, sampling, relay
        self.sequences = sequences
        self.members = list(range(len(sequences)))
        self.id_N = torch.tensor([s.id for s in sequences], device=relay.device)
        config = self.model.config
        self.cache = KVCache(
            sum(len(chunk.decoder.layers) for chunk in self.model.chunks),
            len(sequences),
            max(len(s.tokens) for s in sequences) + sampling.max_new_tokens,
            config.num_query_groups // config.tensor_model_parallel_size,
            config.kv_channels,
            dtype=relay.dtype,
            device=relay.device,
        )
        self.tokens: list[list[int]] = [[] for _ in sequences]
        self.logprobs: list[list[float]] = [[] for _ in sequences]
        self.steps = 0
        self.passes = list(self._prefill())
        self.drawn: tuple[Tensor, Tensor] | None = None

    @property
    def live(self) -> int:
        """Sequences that go on."""
        return self.cache.live

    def forward(self, chunk: int) -> None:
        """Take the present passes through one of this rank's stages; the last stage of all draws the tokens."""
        model = self.model.chunks[chunk]
        rows = []
        for trip in self.passes:
            model.set_input_tensor(None if model.pre_process else self.relay.receive(trip.tokens_T.numel()))
            with whole_sequences(self.model):
                hidden_T1H = model(trip.tokens_T, trip.positions_T, trip.plan)
            if model.post_process:
                rows.append(hidden_T1H.squeeze(1)[trip.rows_N])
            else:
                self.relay.pass_on(hidden_T1H)
        if model.post_process:
            self.drawn = self._draw(torch.cat(rows))
            self.relay.announce(*self.drawn)

    def take(self) -> Iterator[Response]:
        """The tokens that were drawn: yields what is finished by them, and lines up the next step of the others."""
        token_N, logprob_N = self.drawn if self.relay.is_last else self.relay.hear(self.live)
        self.steps += 1
        finished = self._record(token_N, logprob_N, last=self.steps == self.sampling.max_new_tokens)
        for slot in finished:
            yield self._response(self.members[slot])
        token_N = token_N.to(self.relay.device)
        for origin, target in self.cache.retire(finished):
            self.members[target] = self.members[origin]
            token_N[target] = token_N[origin]
            self.id_N[target] = self.id_N[origin]
        del self.members[self.live :]
        self.id_N = self.id_N[: self.live]
        if self.live:
            position_N = self.cache.lengths[: self.live].clone()
            self.cache.begin_step()
            plan = AttentionPlan(cache=self.cache)
            self.passes = [_Pass(token_N[: self.live], position_N, plan, slice(None))]

    def _prefill(self) -> Iterator[_Pass]:
        """The distinct prompts once, in parts; their copies share the result."""
        copies: dict[int, int] = {}
        prompts: dict[int, list[int]] = {}
        for sequence in self.sequences:
            copies[sequence.prompt] = copies.get(sequence.prompt, 0) + 1
            prompts[sequence.prompt] = sequence.tokens
        device = self.relay.device
        for part in _parts(prompts):
            lengths = [len(prompts[p]) for p in part]
            times = [copies[p] for p in part]
            last_rows = torch.tensor(lengths, device=device).cumsum(0) - 1
            yield _Pass(
                torch.tensor([t for p in part for t in prompts[p]], device=device),
                torch.cat([torch.arange(n, device=device) for n in lengths]),
                AttentionPlan(lengths=lengths, filling=self.cache.admit(lengths, times)),
                last_rows.repeat_interleave(torch.tensor(times, device=device)),
            )

    def _draw(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        sampling = self.sampling
        # The position of the token to come; in a decode step the cache counts the token just fed already.
        return sample_tokens(
            self.model.logits_NV(hidden_NH),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            sequence_ids=self.id_N,
            positions=self.cache.lengths[: self.live],
            shard=self.model.vocab_shard,
        )

    def _record(self, token_N: Tensor, logprob_N: Tensor, last: bool) -> list[int]:
        finished = []
        for slot, (token, logprob) in enumerate(zip(token_N.tolist(), logprob_N.tolist(), strict=True)):
            member = self.members[slot]
            self.tokens[member].append(token)
            self.logprobs[member].append(logprob)
            if last or token in self.stop_ids:
                finished.append(slot)
        return finished

    def _response(self, member: int) -> Response:
        sequence, tokens = self.sequences[member], self.tokens[member]
        reason = "stop" if tokens[-1] in self.stop_ids else "length"
        return Response(
            sequence.prompt, sequence.sample, sequence.id, sequence.tokens, tokens, self.logprobs[member], reason
        )


def _parts(prompts: dict[int, list[int]]) -> Iterator[list[int]]:
    part: list[int] = []
    total = 0
    for index, prompt in prompts.items():
        if part and total + len(prompt) > _PREFILL_TOKENS:
            yield part
            part, total = [], 0
        part.append(index)
        total += len(prompt)
    if part:
        yield part
