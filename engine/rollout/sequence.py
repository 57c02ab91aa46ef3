"""A sequence from its submission to its response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from icegrt.rollout.types import FinishReason, Response, Sampling

# A token of a text has at least one byte, and a stop text may begin and end inside tokens.
_TOKENS_AROUND_STOP = 4

# temperature, top_k, top_p, min_p, seed
Distribution = tuple[float, int, float, float, int]


@dataclass(eq=False)
class Sequence:
    """A prompt and the state of its sampling. The scheduler holds the sampled tokens.

    Attributes:
        sampling: of its request.
        stop_ids: ids that end it.
        request: of which it is a sample.
        prompt_index: index of the prompt among those of a call.
        sample: index among the samples of the prompt.
        id: keys the sampler's noise.
        prompt: token ids of the prompt.
        number: the scheduler's id.
        logprobs: log-prob of each sampled token, in nats.
        versions: for each sampled token the version of the weights.
        tail: the last sampled tokens, as many as a stop text may have.
        finish_reason: None while the sequence is unfinished.
    """

    sampling: Sampling
    stop_ids: frozenset[int]
    request: int
    prompt_index: int
    sample: int
    id: int
    prompt: list[int]
    number: int = -1
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def distribution(self) -> Distribution:
        """Settings that change the distribution of every token."""
        s = self.sampling
        return s.temperature, s.top_k, s.top_p, s.min_p, s.seed

    @property
    def masks_logits(self) -> bool:
        """Whether logits are changed before they are sampled from."""
        s = self.sampling
        return bool(s.logit_bias) or s.allowed_token_ids is not None or s.min_new_tokens > 0

    @property
    def n_sampled(self) -> int:
        """Number of sampled tokens."""
        return len(self.logprobs)

    def completes_stop(self, token: int, to_text: Callable[[list[int]], str] | None) -> bool:
        """Return whether a newly sampled token completes a stop text. Call it for every token, in order."""
        if not self.sampling.stop:
            return False
        assert to_text is not None
        longest = max(len(text.encode()) for text in self.sampling.stop)
        self.tail = [*self.tail, token][-longest - _TOKENS_AROUND_STOP :]
        text = to_text(self.tail)
        return any(stop in text for stop in self.sampling.stop)

    def response(self, tokens: list[int]) -> Response:
        """Return the response with its tokens."""
        assert self.finish_reason is not None, "the sequence is unfinished"
        return Response(
            self.prompt_index,
            self.sample,
            self.id,
            self.prompt,
            tokens,
            self.logprobs,
            self.finish_reason,
            self.versions,
        )
