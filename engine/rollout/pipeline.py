"""Messages of a decoding pipeline: hidden states to the next stage, drawn tokens from the last stage to all others.

Sends are not waited for, so that a stage may work on the next micro-group while its results travel; messages between
two ranks arrive in the order of sending. Tokens travel between CPUs, apart from hidden states; and so do hidden states
where stages are interleaved: between two ranks NCCL serves sends and receives in one line, and each rank would wait for
its send to be received before it receives what the other sends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_HIDDEN, _TOKENS = 1, 2  # tags


@dataclass
class PipelineChannel:
    """One rank's place in the pipeline. `width`: hidden size; `interleaved`: the last rank passes on to the first."""

    width: int
    dtype: torch.dtype
    device: torch.device
    interleaved: bool = False
    _sent: list[tuple[Any, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from megatron.core import parallel_state

        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._place = dist.get_rank(self._group)

    @property
    def stages(self) -> int:
        """Ranks of the pipeline."""
        return len(self._ranks)

    @property
    def is_last(self) -> bool:
        """Whether this rank draws the tokens."""
        return self._place == len(self._ranks) - 1

    def send_hidden(self, hidden_T1H: Tensor) -> None:
        """Hand hidden states to the next stage (the last rank's go to the first, for its next virtual stage)."""
        hidden_T1H = hidden_T1H.cpu() if self.interleaved else hidden_T1H
        self._send(hidden_T1H.contiguous(), self._ranks[(self._place + 1) % len(self._ranks)], _HIDDEN)

    def recv_hidden(self, rows: int) -> Tensor:
        """Hidden states from the stage before, [rows, 1, H]."""
        device = torch.device("cpu") if self.interleaved else self.device
        hidden_T1H = torch.empty(rows, 1, self.width, dtype=self.dtype, device=device)
        dist.recv(hidden_T1H, self._ranks[self._place - 1], group=self._group, tag=_HIDDEN)
        return hidden_T1H.to(self.device)

    def broadcast_tokens(self, token_N: Tensor, logprob_N: Tensor) -> None:
        """From the last stage: tokens (int64) and their log-probs (fp32) to every other stage."""
        if len(self._ranks) == 1:
            return
        message_2N = torch.stack([token_N.cpu().int(), logprob_N.cpu().float().view(torch.int32)])
        for rank in self._ranks[:-1]:
            self._send(message_2N, rank, _TOKENS)

    def recv_tokens(self, rows: int) -> tuple[Tensor, Tensor]:
        """What the last stage announced, on the CPU: tokens int64, log-probs fp32."""
        message_2N = torch.empty(2, rows, dtype=torch.int32)
        dist.recv(message_2N, self._ranks[-1], group=self._group, tag=_TOKENS)
        return message_2N[0].long(), message_2N[1].view(torch.float32)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _send(self, x: Tensor, rank: int, tag: int) -> None:
        # The tensor must live until its message has left.
        self._sent = [(work, held) for work, held in self._sent if not work.is_completed()]
        self._sent.append((dist.isend(x, rank, group=self._group, tag=tag), x))
