"""One batched forward pass of a decoding model: a prefill or a decode step, through this rank's pipeline stages."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from icegrt.kernels import sample_tokens
from icegrt.model.attention import AttentionMetadata
from icegrt.model.pipeline_model import PipelineModel
from icegrt.rollout.kv_cache.contiguous import KVCache
from icegrt.rollout.pipeline import PipelineChannel
from icegrt.rollout.sequence import Sequence
from icegrt.rollout.types import Sampling


@dataclass(frozen=True)
class ForwardInput:
    """One pass through the model.

    Attributes:
        tokens_T: int64 token ids.
        positions_T: int64 positions in their sequences.
        metadata: how the rows attend.
        rows_N: the rows whose next token is sampled.
    """

    tokens_T: Tensor
    positions_T: Tensor
    metadata: AttentionMetadata
    rows_N: Tensor | slice


class ModelRunner:
    """Runs the forward passes of one batch of sequences, and samples their next tokens.

    Call `prefill` or `decode` to prepare a pass, then `forward` for every pipeline stage of this rank, then
    `collect_sampled`.

    Args:
        model: the model; `model.chunks` are this rank's pipeline stages, several if stages are interleaved.
        cache: keys and values of the sequences; slot i belongs to the i-th sequence.
        sampling: temperature, truncation and seed.
        channel: messages between pipeline ranks.
    """

    def __init__(self, model: PipelineModel, cache: KVCache, sampling: Sampling, channel: PipelineChannel) -> None:
        self.model, self.cache, self.sampling, self.channel = model, cache, sampling, channel
        self._inputs: list[ForwardInput] = []
        self._sequence_ids_N = self._next_positions_N = torch.empty(0, dtype=torch.int64)
        self._sampled: tuple[Tensor, Tensor]  # set by `forward` of the last stage

    def prefill(self, batches: abc.Sequence[abc.Sequence[abc.Sequence[Sequence]]]) -> None:
        """Prepare a pass over prompts. Each distinct prompt is computed once and copied to all its sequences.

        Args:
            batches: as `Scheduler.schedule_prefill` returns them.
        """
        self._inputs = [self._prefill_input(batch) for batch in batches]
        self._prepare_sampling([sequence for batch in batches for group in batch for sequence in group])

    def decode(self, sequences: abc.Sequence[Sequence]) -> None:
        """Prepare a pass over the newest token of all running sequences, in slot order."""
        rows_2N = [[s.last_token for s in sequences], [len(s) - 1 for s in sequences]]
        token_N, position_N = torch.tensor(rows_2N, device=self.channel.device)
        self.cache.begin_step()
        self._inputs = [ForwardInput(token_N, position_N, AttentionMetadata(cache=self.cache), slice(None))]
        self._prepare_sampling(sequences)

    def forward(self, chunk: int) -> None:
        """Run the prepared pass through one pipeline stage of this rank.

        The model's last stage samples the next tokens and broadcasts them with their log-probs.

        Args:
            chunk: index of the stage in `model.chunks`.
        """
        stage = self.model.chunks[chunk]
        sampled_rows = []
        for forward_input in self._inputs:
            rows = forward_input.tokens_T.numel()
            stage.set_input_tensor(None if stage.pre_process else self.channel.recv_hidden(rows))
            hidden_T1H = stage.decode(forward_input.tokens_T, forward_input.positions_T, forward_input.metadata)
            if stage.post_process:
                sampled_rows.append(hidden_T1H.squeeze(1)[forward_input.rows_N])
            else:
                self.channel.send_hidden(hidden_T1H)
        if stage.post_process:
            self._sampled = self._sample(torch.cat(sampled_rows))
            self.channel.broadcast_tokens(*self._sampled)

    def collect_sampled(self) -> tuple[list[int], list[float]]:
        """Return the sampled tokens and their log-probs. Call it once per prepared pass, after `forward`.

        Ranks without the model's last stage receive them from its rank: a second call would wait for ever.

        Returns:
            A token id and a log-prob in nats for each sequence of the pass, in order.
        """
        rows = self._sequence_ids_N.numel()
        token_N, logprob_N = self._sampled if self.channel.is_last else self.channel.recv_tokens(rows)
        return token_N.tolist(), logprob_N.tolist()

    def _prefill_input(self, batch: abc.Sequence[abc.Sequence[Sequence]]) -> ForwardInput:
        device = self.channel.device
        prompts = [sequences[0].prompt for sequences in batch]
        lengths, copies = [len(prompt) for prompt in prompts], [len(sequences) for sequences in batch]
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        last_rows = cu_seqlens[1:].long() - 1
        return ForwardInput(
            torch.tensor([token for prompt in prompts for token in prompt], device=device),
            torch.cat([torch.arange(length, device=device) for length in lengths]),
            AttentionMetadata(
                lengths=lengths, cu_seqlens=cu_seqlens, prefill_writer=self.cache.allocate(lengths, copies)
            ),
            last_rows.repeat_interleave(torch.tensor(copies, device=device)),
        )

    def _prepare_sampling(self, sequences: abc.Sequence[Sequence]) -> None:
        # The noise of a token depends on its sequence's id and its position alone.
        rows_2N = [[s.id for s in sequences], [len(s) for s in sequences]]
        self._sequence_ids_N, self._next_positions_N = torch.tensor(rows_2N, device=self.channel.device)

    def _sample(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        return sample_tokens(
            self.model.logits_NV(hidden_NH),
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed,
            sequence_ids=self._sequence_ids_N,
            positions=self._next_positions_N,
            shard=self.model.vocab_shard,
        )
