"""A sequence while it is decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from icegrt.rollout.types import Response


@dataclass
class Sequence:
    """A prompt and the tokens sampled for it so far.

    Attributes:
        prompt_index: index of the prompt; sequences of one prompt share its prefill.
        sample: index among the samples of the prompt.
        id: keys the sampler's noise.
        prompt: token ids of the prompt.
        tokens: sampled token ids, a stop token included.
        logprobs: log-prob of each sampled token, in nats.
        finish_reason: None while the sequence runs; 'stop' after a stop token, 'length' at `max_new_tokens`.
    """

    prompt_index: int
    sample: int
    id: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def __len__(self) -> int:
        """Return the number of tokens: prompt and sampled."""
        return len(self.prompt) + len(self.tokens)

    @property
    def last_token(self) -> int:
        """The newest token."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    def response(self) -> Response:
        """Return the finished sequence as a response."""
        assert self.finish_reason is not None, "the sequence is still running"
        return Response(
            self.prompt_index, self.sample, self.id, self.prompt, self.tokens, self.logprobs, self.finish_reason
        )
