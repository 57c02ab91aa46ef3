"""The settings of a rollout, and its results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from icegrt.config import SamplingConfig
from icegrt.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. The same seed gives the same tokens in any layout and batch order.

    Args:
        temperature: divides the logits in fp32; 0 is greedy.
        top_k: sample from the k most probable tokens; 0 keeps all.
        top_p: sample from the most probable tokens that reach this probability; 1 keeps all.
        max_new_tokens: longest response, in tokens.
        seed: of the noise.

    Raises:
        ConfigError: a value is out of bounds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        is_valid = 0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1  # NaN is not
        if not is_valid or self.max_new_tokens < 1:
            raise ConfigError(
                f"sampling: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got {self}"
            )

    @classmethod
    def of(cls, config: SamplingConfig, seed: int) -> Sampling:
        """Return the sampling of a configuration section."""
        return cls(config.temperature, config.top_k, config.top_p, config.max_new_tokens, seed)


# 'stop': the response ended with EOS; 'length': it was truncated.
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Args:
        prompt_index: index of the prompt.
        sample: index among the samples of the prompt.
        sequence_id: the key of the sampler's noise.
        prompt: token ids of the prompt.
        tokens: sampled token ids, EOS included.
        logprobs: log-prob of each token under the distribution it was sampled from, in nats.
        finish_reason: 'stop' after EOS, 'length' when truncated at `max_new_tokens`.
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
        """Whether the response was truncated: it has no EOS."""
        return self.finish_reason == "length"
