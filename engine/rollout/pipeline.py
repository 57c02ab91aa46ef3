"""Messages of a decoding pipeline: hidden states to the next stage, sampled tokens from the last stage to the others.

Sends are asynchronous, so that a stage can work on the next micro-batch. Messages between two ranks arrive in the order
of sending. NCCL serves the sends and receives of two ranks in one queue, and two ranks that send to each other would
deadlock: messages to a later stage have one group, messages to an earlier stage (tokens, and the hidden states of
interleaved stages) another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.kernels.common.collectives import communication_device

_HIDDEN, _TOKENS = 1, 2  # tags


@dataclass
class PipelineChannel:
    """One rank's end of the pipeline.

    Args:
        return_group: the ranks of the pipeline, for messages to an earlier stage.
    """

    return_group: dist.ProcessGroup
    _pending_sends: list[tuple[Any, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from megatron.core import parallel_state

        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._stage = dist.get_rank(self._group)
        self._token_device = communication_device(self._group, torch.device("cpu"))

    @property
    def stages(self) -> int:
        """Number of pipeline ranks."""
        return len(self._ranks)

    @property
    def is_last(self) -> bool:
        """Whether this rank samples the tokens."""
        return self._stage == len(self._ranks) - 1

    def send_hidden(self, hidden_TH: Tensor) -> None:
        """Send hidden states to the next stage. The last rank sends to the first, for its next virtual stage."""
        group = self.return_group if self.is_last else self._group
        # A copy: the next step overwrites the buffer while the message may be under way.
        self._send(hidden_TH.clone(), self._ranks[(self._stage + 1) % len(self._ranks)], group, _HIDDEN)

    def recv_hidden(self, out_TH: Tensor) -> None:
        """Receive hidden states from the previous stage into `out_TH`."""
        group = self.return_group if self._stage == 0 else self._group
        dist.recv(out_TH, self._ranks[self._stage - 1], group=group, tag=_HIDDEN)

    def broadcast_tokens(self, token_N: Tensor, logprob_N: Tensor) -> None:
        """Send tokens (int64) and their log-probs (fp32) from the last stage to all others."""
        if len(self._ranks) == 1:
            return
        message_2N = torch.stack([token_N.int(), logprob_N.float().view(torch.int32)]).to(self._token_device)
        for rank in self._ranks[:-1]:
            self._send(message_2N, rank, self.return_group, _TOKENS)

    def recv_tokens(self, rows: int) -> tuple[Tensor, Tensor]:
        """Receive the last stage's tokens (int64) and log-probs (fp32), [rows] each, on the CPU."""
        message_2N = torch.empty(2, rows, dtype=torch.int32, device=self._token_device)
        dist.recv(message_2N, self._ranks[-1], group=self.return_group, tag=_TOKENS)
        message_2N = message_2N.cpu()
        return message_2N[0].long(), message_2N[1].view(torch.float32)

    def finish(self) -> None:
        """Wait until all sends are complete."""
        for work, _ in self._pending_sends:
            work.wait()
        self._pending_sends.clear()

    def _send(self, x: Tensor, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        # A tensor must live until its send is complete.
        self._pending_sends = [(work, tensor) for work, tensor in self._pending_sends if not work.is_completed()]
        self._pending_sends.append((dist.isend(x, rank, group=group, tag=tag), x))
