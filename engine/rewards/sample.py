"""What a reward function is given of a response, and what it may say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Sample:
    """One response.

    text: the answer without special tokens. tokens: as sampled, EOS included. finish_reason: 'stop' or 'length'.
    prompt: the text that it answers, as the model saw it (chat template included); prompt_tokens: its ids.
    row: all columns of the prompt's data row; where: its file and line. group: responses to one prompt share it;
    index: which of them this is, from 0.
    """

    text: str
    tokens: list[int]
    prompt: str
    prompt_tokens: list[int]
    finish_reason: Literal["stop", "length"]
    row: dict[str, Any]
    where: str
    group: int
    index: int = 0

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The prompt as a conversation: a plain prompt is one user message.

        A row's `prompt` is what was answered; `messages` beside it may go on beyond it.
        """
        prompt = self.row.get("prompt") or self.row.get("messages")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        return turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation: the prompt's messages, then the answer."""
        return [*self.prompt_messages, {"role": "assistant", "content": self.text}]


@dataclass(frozen=True)
class RewardResult:
    """What a reward function says of one response, where a number is not enough.

    score: a finite number, paid at the last token; None says nothing of this response, which is no error.
    metrics: numbers to log beside it, by name. token_rewards_A: one finite number per token of `sample.tokens`, paid
    there and not part of the score.
    """

    score: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    token_rewards_A: Sequence[float] | None = None


@dataclass(frozen=True)
class ScoringFailure:
    """Why a response has no score, in one sentence that names its row."""

    message: str


ScoreOrFailure = RewardResult | ScoringFailure
