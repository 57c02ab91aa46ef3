"""The input of a reward function, `Sample`, and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Sample:
    """One response, with its prompt and data row.

    Args:
        text: the answer without special tokens.
        tokens: the ids as sampled, EOS included.
        prompt: the prompt's text as the model reads it, chat template included.
        prompt_tokens: the ids of the prompt.
        finish_reason: "stop" or "length".
        row: all columns of the prompt's data row.
        where: file and line of the row.
        group: the same number for all responses to one prompt.
        index: the response's number among those to its prompt, from 0.
        columns: names of all columns of the data; `row` may lack some.
        is_chat: a prompt of the data is a list of messages; that of `row` may be text.
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
    columns: tuple[str, ...] = ()
    is_chat: bool = False

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The prompt as a list of messages; a prompt of text is one user message."""
        # If the row has both, `prompt` is the answered prompt: `messages` may continue after it.
        prompt = self.row.get("prompt") or self.row.get("messages")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        return turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation: the prompt's messages, then the answer."""
        return [*self.prompt_messages, {"role": "assistant", "content": self.text}]


@dataclass(frozen=True)
class RewardResult:
    """The result of a reward function for one response, if a number is not enough.

    Args:
        score: a finite number, given as reward at the last token. None: the function does not judge this response,
            which is no error.
        metrics: further numbers to log, by name.
        token_rewards_A: one finite reward per token of `sample.tokens`. They are not part of the score.

    Shape:
        token_rewards_A: (A,), A = len(sample.tokens).
    """

    score: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    token_rewards_A: Sequence[float] | None = None


@dataclass(frozen=True)
class ScoringFailure:
    """The reason why a response has no score, in one sentence that names its row."""

    message: str


ScoreOrFailure = RewardResult | ScoringFailure
