"""What a rollout asks for and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from icegrt.config import SamplingConfig
from icegrt.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The same seed gives the same tokens in any layout and batch order.

    temperature: divides the logits in fp32; 0 is greedy. top_k: 0 keeps all. max_new_tokens: longest answer in tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ConfigError(
                f"sampling: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got {self}"
            )

    @classmethod
    def of(cls, config: SamplingConfig, seed: int) -> Sampling:
        """The sampling that a configuration section describes."""
        return cls(config.temperature, config.top_k, config.top_p, config.max_new_tokens, seed)


# 'stop': the response ended with EOS; 'length': it was truncated.
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Response:
    """One sampled answer.

    prompt_index: which prompt; sample: which of its samples; sequence_id: what the sampler's noise was keyed by.
    tokens: as sampled, EOS included. logprobs: of each token under the distribution it was drawn from.
    finish_reason: 'stop' ended with EOS; 'length' was truncated.
    """

    prompt_index: int
    sample: int
    sequence_id: int
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut for length: it ended without EOS."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Sequence:
    """A sequence to be drawn."""

    prompt: int
    sample: int
    id: int
    tokens: list[int]
