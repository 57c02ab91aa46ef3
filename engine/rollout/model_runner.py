"""Runs planned steps through this rank's pipeline stages, and samples the next tokens on the device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.kernels import VocabShard, lm_logits
from icegrt.kernels.validate import unchecked
from icegrt.rollout.graphs import StepGraphs
from icegrt.rollout.micro_group import MicroGroup, Step
from icegrt.rollout.pipeline import PipelineChannel
from icegrt.rollout.sampler import sample
from icegrt.rollout.stage import Activations, DecodeStage

# Views of the static buffers are kept for this many numbers of rows.
_KEPT_VIEWS = 512


@dataclass(frozen=True)
class OutputBuffers:
    """The static buffers of the last stage.

    Attributes:
        hidden_NH: the rows that are sampled from.
        logits_NV: fp32.
    """

    hidden_NH: Tensor
    logits_NV: Tensor

    @classmethod
    def allocate(
        cls, rows: int, hidden_size: int, vocab_rows: int, dtype: torch.dtype, device: torch.device
    ) -> OutputBuffers:
        """Allocate the buffers of up to `rows` samples."""
        logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            torch.empty(rows, hidden_size, dtype=dtype, device=device),
            torch.empty(rows, vocab_rows, dtype=logits_dtype, device=device),
        )


class ModelRunner:
    """Runs steps. All micro-groups of a rank share its activations.

    Args:
        activations: static buffers of the trunk.
        output: static buffers of the last stage; None on other ranks.
        channel: messages between pipeline ranks.
        graphs: of decode steps; None runs every step eagerly.
        shard: this rank's slice of the vocabulary; None: all of it.
    """

    def __init__(
        self,
        activations: Activations,
        output: OutputBuffers | None,
        channel: PipelineChannel,
        graphs: StepGraphs | None,
        shard: VocabShard | None,
    ) -> None:
        self.activations, self.output, self.channel = activations, output, channel
        self.graphs, self.shard = graphs, shard
        self._views: dict[int, Activations] = {}
        self._is_checked = False

    def forward(self, group: MicroGroup, step: Step, chunk: int) -> None:
        """Run a step through one pipeline stage of this rank. The last stage samples, and sends what it sampled.

        Args:
            group: whose step it is.
            step: the step.
            chunk: index of the stage on this rank.
        """
        # Arguments differ between steps in their numbers of rows alone: the first step's are checked.
        with unchecked() if self._is_checked else contextlib.nullcontext():
            self._forward(group, step, group.stages[chunk])
        self._is_checked |= step.size.only_decodes

    def _forward(self, group: MicroGroup, step: Step, stage: DecodeStage) -> None:
        x = self._rows(step.size.rows)
        if stage.weights.embedding is None:
            self.channel.recv_hidden(x.residual)
        if stage.weights.head is None:
            if stage.weights.embedding is not None:
                group.fill_tokens(step.rows)
            stage.forward(step.rows, x)
            self.channel.send_hidden(x.residual)
            return

        def compute() -> None:
            if stage.weights.embedding is not None:
                group.fill_tokens(step.rows)
            stage.forward(step.rows, x)
            self._sample(stage, group, step, x)

        is_static = step.size.only_decodes and step.settings.is_static and self.channel.stages == 1
        if self.graphs is not None and is_static:
            # Offloading may bring the parameters back to other addresses than a graph has.
            addresses = stage.weights.head.data_ptr(), *stage.weights.addresses
            key = (id(group), step.size, step.rows.max_length, step.settings.distribution, addresses)
            self.graphs.run(key, compute)
        else:
            compute()
        self._deliver(group, step)

    def _sample(self, stage: DecodeStage, group: MicroGroup, step: Step, x: Activations) -> None:
        assert self.output is not None and stage.weights.head is not None
        count = step.size.samples
        if not count:
            return
        rows_N, slots_N, ids_N, positions_N = group.sample_keys(step.size)
        hidden_NH = x.normed
        if not step.size.only_decodes:
            hidden_NH = self.output.hidden_NH[:count]
            torch.index_select(x.normed, 0, rows_N, out=hidden_NH)
        logits_NV = self.output.logits_NV[:count]
        lm_logits(hidden_NH, stage.weights.head, out=logits_NV)
        out = group.token_N[:count], group.logprob_N[:count]
        sample(logits_NV, step.settings, ids_N, positions_N, self.shard, out)
        if group.lookahead:
            group.newest.index_copy_(0, slots_N, out[0])

    def _deliver(self, group: MicroGroup, step: Step) -> None:
        """Start the copy of a step's tokens and log-probs to the host, and send them to the other stages."""
        count = len(step.samples)
        if not count:
            return
        token_N, logprob_N = group.token_N[:count], group.logprob_N[:count]
        self.channel.broadcast_tokens(token_N, logprob_N)
        if token_N.device.type == "cpu" and not group.lookahead:
            step.host_token_N, step.host_logprob_N = token_N, logprob_N
            return
        step.host_token_N, step.host_logprob_N = group.host_results(count)
        step.host_token_N.copy_(token_N, non_blocking=True)
        step.host_logprob_N.copy_(logprob_N, non_blocking=True)
        if token_N.device.type != "cpu" and torch.cuda.is_available():
            step.event = torch.cuda.Event()
            step.event.record()

    def collect(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the tokens (int64) and log-probs (fp32) of a step on the host, [N] each, once it is complete."""
        count = len(step.samples)
        if not count:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        if not self.channel.is_last:
            return self.channel.recv_tokens(count)
        if step.event is not None:
            step.event.synchronize()
        assert step.host_token_N is not None and step.host_logprob_N is not None
        return step.host_token_N, step.host_logprob_N

    def _rows(self, count: int) -> Activations:
        if count not in self._views:
            if len(self._views) >= _KEPT_VIEWS:
                self._views.clear()
            self._views[count] = self.activations.rows(count)
        return self._views[count]
