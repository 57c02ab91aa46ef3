"""A batch of sequences that is decoded together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.kernels import sample_tokens
from icegrt.model.attention import AttentionMetadata
from icegrt.model.language_model import LanguageModel
from icegrt.rollout.kv_cache.contiguous import KVCache
from icegrt.rollout.pipeline import PipelineChannel
from icegrt.rollout.types import FinishReason, Response, Sampling, Sequence


@contextlib.contextmanager
def sequence_parallel_disabled(model: LanguageModel) -> Iterator[None]:
    """Sequence parallelism off while decoding: one token per sequence does not divide by the tensor-parallel size."""
    parts = [part for chunk in model.chunks for part in chunk.modules()] if model.config.sequence_parallel else []
    names = ("sequence_parallel", "reduce_scatter_embeddings")
    switched = [(x, name) for x in (*parts, model.config) for name in names if x.__dict__.get(name) is True]
    try:
        for place, name in switched:
            setattr(place, name, False)
        yield
    finally:
        for place, name in switched:
            setattr(place, name, True)


# A prefill is cut so that its activations stay small beside the cache.
_PREFILL_TOKENS = 8192


Pair = tuple[int, int]


@dataclass(frozen=True)
class ForwardInput:
    """Rows of one trip through the model: tokens, positions, how they attend, and which rows are sampled from."""

    tokens_T: Tensor
    positions_T: Tensor
    plan: AttentionMetadata
    rows_N: Tensor | slice


class DecodeBatch:
    """Sequences that are decoded together. Slot i of the cache belongs to `members[i]`, an index into `sequences`."""

    def __init__(
        self,
        model: LanguageModel,
        stop_ids: frozenset[int],
        sequences: list[Sequence],
        sampling: Sampling,
        channel: PipelineChannel,
    ) -> None:
        self.model, self.stop_ids, self.sampling, self.channel = model, stop_ids, sampling, channel
        self.sequences = sequences
        self.members = list(range(len(sequences)))
        self.id_N = torch.tensor([s.id for s in sequences], device=channel.device)
        config = self.model.config
        self.cache = KVCache(
            sum(len(chunk.decoder.layers) for chunk in self.model.chunks),
            len(sequences),
            max(len(s.tokens) for s in sequences) + sampling.max_new_tokens,
            config.num_query_groups // config.tensor_model_parallel_size,
            config.kv_channels,
            dtype=channel.dtype,
            device=channel.device,
        )
        self.tokens: list[list[int]] = [[] for _ in sequences]
        self.logprobs: list[list[float]] = [[] for _ in sequences]
        self.steps = 0
        self.forward_inputs = list(self._prefill())
        self.sampled: tuple[Tensor, Tensor]  # set by the last stage's forward pass

    @property
    def live(self) -> int:
        """Sequences that go on."""
        return self.cache.live

    def forward(self, chunk: int) -> None:
        """Take the present passes through one of this rank's stages; the last stage of all draws the tokens."""
        model = self.model.chunks[chunk]
        rows = []
        for forward_input in self.forward_inputs:
            model.set_input_tensor(
                None if model.pre_process else self.channel.recv_hidden(forward_input.tokens_T.numel())
            )
            with sequence_parallel_disabled(self.model):
                hidden_T1H = model(forward_input.tokens_T, forward_input.positions_T, forward_input.plan)
            if model.post_process:
                rows.append(hidden_T1H.squeeze(1)[forward_input.rows_N])
            else:
                self.channel.send_hidden(hidden_T1H)
        if model.post_process:
            self.sampled = self.sample_next_tokens(torch.cat(rows))
            self.channel.broadcast_tokens(*self.sampled)

    def process_sampled_tokens(self) -> Iterator[Response]:
        """The tokens that were drawn: yields what is finished by them, and lines up the next step of the others."""
        token_N, logprob_N = self.sampled if self.channel.is_last else self.channel.recv_tokens(self.live)
        self.steps += 1
        finished = self._record(token_N, logprob_N, last=self.steps == self.sampling.max_new_tokens)
        for slot in finished:
            yield self._response(self.members[slot])
        token_N = token_N.to(self.channel.device)
        for origin, target in self.cache.free(finished):
            self.members[target] = self.members[origin]
            token_N[target] = token_N[origin]
            self.id_N[target] = self.id_N[origin]
        del self.members[self.live :]
        self.id_N = self.id_N[: self.live]
        if self.live:
            position_N = self.cache.lengths[: self.live].clone()
            self.cache.begin_step()
            plan = AttentionMetadata(cache=self.cache)
            self.forward_inputs = [ForwardInput(token_N[: self.live], position_N, plan, slice(None))]

    def _prefill(self) -> Iterator[ForwardInput]:
        """The distinct prompts once, in parts; their copies share the result."""
        copies: dict[int, int] = {}
        prompts: dict[int, list[int]] = {}
        for sequence in self.sequences:
            copies[sequence.prompt] = copies.get(sequence.prompt, 0) + 1
            prompts[sequence.prompt] = sequence.tokens
        device = self.channel.device
        for part in _prefill_parts(prompts):
            lengths = [len(prompts[p]) for p in part]
            times = [copies[p] for p in part]
            last_rows = torch.tensor(lengths, device=device).cumsum(0) - 1
            yield ForwardInput(
                torch.tensor([t for p in part for t in prompts[p]], device=device),
                torch.cat([torch.arange(n, device=device) for n in lengths]),
                AttentionMetadata(lengths=lengths, prefill_writer=self.cache.allocate(lengths, times)),
                last_rows.repeat_interleave(torch.tensor(times, device=device)),
            )

    def sample_next_tokens(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
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
        reason: FinishReason = "stop" if tokens[-1] in self.stop_ids else "length"
        return Response(
            sequence.prompt, sequence.sample, sequence.id, sequence.tokens, tokens, self.logprobs[member], reason
        )


def _prefill_parts(prompts: dict[int, list[int]]) -> Iterator[list[int]]:
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
