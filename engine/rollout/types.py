"""The settings of a rollout, and its results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from icegrt.config import SamplingConfig
from icegrt.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are sampled. The same seed gives the same tokens in any layout and batch order.

    Args:
        temperature: divides the logits in fp32; 0 is greedy.
        top_k: sample from the k most probable tokens; 0 keeps all.
        top_p: sample from the most probable tokens that reach this probability; 1 keeps all.
        max_new_tokens: longest response, in tokens.
        seed: of the noise.
        min_p: sample from the tokens with at least this share of the largest probability; 0 keeps all.
        min_new_tokens: no stop token is sampled before this many tokens.
        stop: texts that end a response. The token that completes one is the last.
        stop_token_ids: ids that end a response, besides those of the engine.
        logit_bias: numbers that are added to the logits of these ids, before the temperature.
        allowed_token_ids: the ids that may be sampled; None: all. Add the stop token, or a response cannot end.

    Raises:
        ConfigError: a value is out of bounds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        is_valid = 0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1  # NaN is not
        if not is_valid or self.max_new_tokens < 1:
            raise ConfigError(
                f"sampling: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got {self}"
            )
        if not 0 <= self.min_p <= 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"sampling: expected 0 <= min_p <= 1 and 0 <= min_new_tokens <= max_new_tokens, got {self}"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(f"sampling.stop: expected a sequence of texts that are not empty, got {self.stop!r}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ConfigError("sampling.allowed_token_ids is empty, so no token could be sampled; None allows all")
        if any(math.isnan(bias) or bias == math.inf for bias in self.logit_bias.values()):
            raise ConfigError("sampling.logit_bias: expected finite numbers or -inf")

    @classmethod
    def of(cls, config: SamplingConfig, seed: int) -> Sampling:
        """Return the sampling of a configuration section."""
        return cls(
            config.temperature,
            config.top_k,
            config.top_p,
            config.max_new_tokens,
            seed,
            min_p=config.min_p,
            min_new_tokens=config.min_new_tokens,
            stop=tuple(config.stop),
        )


# 'stop': a stop token or a stop text; 'length': truncated at the longest length; 'abort': by the caller.
FinishReason = Literal["stop", "length", "abort"]


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
        finish_reason: 'stop' after EOS or a stop text, 'length' when truncated at `max_new_tokens`, 'abort'.
        policy_versions: for each token, `PipelineModel.weights_version` of the weights that sampled it. Empty: unknown.
    """

    prompt_index: int
    sample: int
    sequence_id: int
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    policy_versions: list[int] = field(default_factory=list)

    @property
    def truncated(self) -> bool:
        """Whether the response has no end of its own: it was cut off at the longest length, or aborted."""
        return self.finish_reason != "stop"
