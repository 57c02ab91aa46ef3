"""Batched decoding over the actor's own Megatron weights: prefill once per prompt, then one token per live sequence.

A wave of sequences starts together and the finished ones leave the batch. Sampling is layout-invariant: the noise of a
token depends on (seed, sequence id, position, vocabulary id) alone, never on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icegrt.errors import DataError
from icegrt.kernels import sample_tokens
from icegrt.model.attention import AttentionPlan
from icegrt.model.language_model import LanguageModel
from icegrt.rollout.cache import KVCache
from icegrt.rollout.response import Response, Sampling

# A prefill is cut so that its activations stay small beside the cache.
_PREFILL_TOKENS = 8192


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
        self, prompts: Sequence[list[int]], samples: int, sampling: Sampling, first_sequence_id: int = 0
    ) -> Iterator[Response]:
        """Yield every response as soon as it is finished; sample s of prompt p has id first + p * samples + s."""
        self._check(prompts, sampling)
        pending = [(p, s) for p in range(len(prompts)) for s in range(samples)]
        for start in range(0, len(pending), self.max_batch):
            wave = pending[start : start + self.max_batch]
            yield from _Wave(self, prompts, samples, sampling, first_sequence_id, wave).run()

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


class _Wave:
    """Sequences that start together. Slot i of the cache belongs to `members[i]`, an index into `wave`."""

    def __init__(self, decoder: Decoder, prompts, samples, sampling, first_id, wave) -> None:
        self.model, self.stop_ids, self.sampling = decoder.model, decoder.stop_ids, sampling
        self.prompts, self.wave = prompts, wave
        self.ids = [first_id + p * samples + s for p, s in wave]
        self.members = list(range(len(wave)))
        architecture = self.model.architecture
        parameter = next(self.model.parameters())
        self.device = parameter.device
        self.cache = KVCache(
            architecture.num_layers,
            len(wave),
            max(len(prompts[p]) for p, _ in wave) + sampling.max_new_tokens,
            architecture.num_kv_heads,
            architecture.head_dim,
            dtype=parameter.dtype,
            device=self.device,
        )
        self.tokens: list[list[int]] = [[] for _ in wave]
        self.logprobs: list[list[float]] = [[] for _ in wave]

    def run(self) -> Iterator[Response]:
        hidden_NH = self._prefill()
        id_N = torch.tensor(self.ids, device=self.device)
        for step in range(self.sampling.max_new_tokens):
            position_N = self.cache.lengths[: self.cache.live]
            token_N, logprob_N = sample_tokens(
                self.model.logits_NV(hidden_NH),
                temperature=self.sampling.temperature,
                top_k=self.sampling.top_k,
                top_p=self.sampling.top_p,
                seed=self.sampling.seed,
                sequence_ids=id_N,
                positions=position_N,
                shard=self.model.vocab_shard,
            )
            finished = self._record(token_N, logprob_N, last=step + 1 == self.sampling.max_new_tokens)
            for slot in finished:
                yield self._response(self.members[slot])
            moves = self.cache.retire(finished)
            for origin, target in moves:
                self.members[target] = self.members[origin]
                token_N[target] = token_N[origin]
                id_N[target] = id_N[origin]
            live = self.cache.live
            if live == 0:
                return
            del self.members[live:]
            id_N = id_N[:live]
            hidden_NH = self._decode(token_N[:live])

    def _prefill(self) -> Tensor:
        """Run the distinct prompts once; their copies share the result. Returns [live, H], the last rows' hidden."""
        copies: dict[int, int] = {}
        for prompt, _ in self.wave:
            copies[prompt] = copies.get(prompt, 0) + 1
        rows = []
        for group in _groups(list(copies), self.prompts):
            lengths = [len(self.prompts[p]) for p in group]
            times = [copies[p] for p in group]
            self.cache.admit(lengths, times)
            tokens_T = torch.tensor([t for p in group for t in self.prompts[p]], device=self.device)
            positions_T = torch.cat([torch.arange(n, device=self.device) for n in lengths])
            hidden = self.model(tokens_T, positions_T, AttentionPlan(lengths=lengths, cache=self.cache)).squeeze(1)
            last_rows = torch.tensor(lengths, device=self.device).cumsum(0) - 1
            rows.append(hidden[last_rows].repeat_interleave(torch.tensor(times, device=self.device), dim=0))
        return torch.cat(rows)

    def _decode(self, token_N: Tensor) -> Tensor:
        position_N = self.cache.lengths[: self.cache.live].clone()
        self.cache.begin_step()
        return self.model(token_N, position_N, AttentionPlan(cache=self.cache, decoding=True)).squeeze(1)

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
        prompt, sample = self.wave[member]
        tokens = self.tokens[member]
        reason = "stop" if tokens[-1] in self.stop_ids else "length"
        return Response(prompt, sample, self.ids[member], self.prompts[prompt], tokens, self.logprobs[member], reason)


def _groups(indices: list[int], prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    group: list[int] = []
    total = 0
    for index in indices:
        if group and total + len(prompts[index]) > _PREFILL_TOKENS:
            yield group
            group, total = [], 0
        group.append(index)
        total += len(prompts[index])
    if group:
        yield group
