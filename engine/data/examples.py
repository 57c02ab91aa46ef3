"""Encode rows as token lists: supervised examples (SFT, ptx) and prompts (sample, PPO, generate).

An encoder turns a batch of rows into items. A row that does not fit the context raises an error with its lengths, is
dropped, or is truncated, according to `truncation`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from icegrt.data.conversation import prompt_column, prompt_conversation, training_conversation
from icegrt.data.rows import Row
from icegrt.data.tokenization import TokenizedExample, prompt_tokens, tokenize_conversations
from icegrt.errors import DataError

Truncation = Literal["error", "drop", "left", "right"]
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Example:
    """Supervised data: prompt and response tokens, EOS last unless `truncated`.

    `action_mask` has one bool per response token: False for tool and user turns inside the response. None: the
    assistant wrote every response token. `row` holds the row's columns.
    """

    prompt: list[int]
    response: list[int]
    action_mask: list[bool] | None
    where: str
    row: dict[str, Any]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass
class PromptSchema:
    """What the rows of one source of prompts have in common, whichever rows a batch has.

    `columns`: the names of all columns, in the order of their first use. `is_chat`: a prompt is a list of messages.
    """

    columns: dict[str, None] = field(default_factory=dict)
    is_chat: bool = False

    def add(self, row: dict[str, Any]) -> None:
        """Take a row's columns and the form of its prompt into account."""
        self.columns.update(dict.fromkeys(row))
        self.is_chat = self.is_chat or not isinstance(row.get("prompt"), str)


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: its tokens (generation prompt included), and the row with all its columns.

    If the prompt comes from a column of another name, the row has it as `prompt` too. `schema` describes all rows of
    the source; it is complete when the source has been encoded once.
    """

    tokens: list[int]
    where: str
    row: dict[str, Any]
    truncated: bool = False
    schema: PromptSchema = field(default_factory=PromptSchema, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class SkippedRow:
    """A row that was dropped, and the reason in words."""

    reason: str


Item = TypeVar("Item")
Encoder = Callable[[Sequence[Row]], "list[Item | SkippedRow]"]


class ExampleEncoder:
    """Encode rows of `messages`, or of a prompt and a response, as `Example`s of at most `max_length` tokens.

    Loss is on every assistant turn, EOS included; the prompt is everything before the first one.

    truncation, for a longer row: "error" raises, "drop" drops it, "right" truncates the response (and adds no EOS),
    "left" truncates the prompt's beginning. A row left without a prompt or without a trained token is dropped.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: Truncation = "error", stop_ids: Collection[int] = ()
    ) -> None:
        check_options(max_length, truncation)
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.stop_ids = frozenset(stop_ids)

    def __call__(self, rows: Sequence[Row]) -> list[Example | SkippedRow]:
        """Return an example or a `SkippedRow` for each row.

        Raises:
            DataError: a row cannot be used; it names file, line and key.
        """
        encoded = tokenize_conversations(self.tokenizer, [training_conversation(row) for row in rows], self.stop_ids)
        return [self._fit(row, tokenized) for row, tokenized in zip(rows, encoded, strict=True)]

    def _fit(self, row: Row, tokenized: TokenizedExample) -> Example | SkippedRow:
        prompt, response, mask = tokenized.prompt, tokenized.response, tokenized.action_mask
        excess = len(prompt) + len(response) - self.max_length
        if excess <= 0:
            return Example(prompt, response, mask, row.where, row.data)
        if self.truncation == "error":
            raise too_long(row.where, len(prompt), len(response), self.max_length)
        if self.truncation == "left" and excess < len(prompt):
            return Example(prompt[excess:], response, mask, row.where, row.data, truncated=True)
        room = self.max_length - len(prompt)
        if self.truncation == "right" and room > 0 and (mask is None or any(mask[:room])):
            mask = None if mask is None or all(mask[:room]) else mask[:room]
            return Example(prompt, response[:room], mask, row.where, row.data, truncated=True)
        return SkippedRow(f"longer than {self.max_length} tokens")


class PromptEncoder:
    """Encode rows as `Prompt`s of at most `max_prompt` tokens: the prompt column, else `messages` without an answer.

    With a chat template (and `chat` on) a string becomes a user message; otherwise it is plain text. `limit_reason`
    explains the limit in the error message ("context 512 - max_new_tokens 88 leaves 424").

    truncation, for a longer prompt: "error" raises, "drop" drops it, "left" truncates its beginning. The end, where the
    answer starts, is never truncated.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_prompt: int,
        truncation: Truncation = "error",
        *,
        chat: bool = True,
        limit_reason: str = "",
    ) -> None:
        check_options(max_prompt, truncation, ("error", "drop", "left"))
        self.tokenizer, self.max_prompt, self.truncation, self.chat = tokenizer, max_prompt, truncation, chat
        self.limit_reason = limit_reason or f"at most {max_prompt} fit"
        self.schema = PromptSchema()

    def __call__(self, rows: Sequence[Row]) -> list[Prompt | SkippedRow]:
        """Return a prompt or a `SkippedRow` for each row.

        Raises:
            DataError: a row cannot be used; it names file, line and key.
        """
        encoded = prompt_tokens(self.tokenizer, [prompt_conversation(row) for row in rows], chat=self.chat)
        return [self._fit(row, tokens) for row, tokens in zip(rows, encoded, strict=True)]

    def _fit(self, row: Row, tokens: list[int]) -> Prompt | SkippedRow:
        key = prompt_column(row)
        data = row.data if key in (None, "prompt") else {**row.data, "prompt": row.data[key]}
        self.schema.add(data)
        if len(tokens) <= self.max_prompt:
            return Prompt(tokens, row.where, data, schema=self.schema)
        if self.truncation == "error":
            raise DataError(
                f"{row.where}: prompt of {len(tokens)} tokens, but {self.limit_reason}: shorten it, lower "
                "max_new_tokens, or set truncation to drop or left"
            )
        if self.truncation == "left":
            return Prompt(tokens[-self.max_prompt :], row.where, data, truncated=True, schema=self.schema)
        return SkippedRow(f"longer than {self.max_prompt} tokens")


def all_rows_dropped(where: str, count: int, reasons: str) -> DataError:
    """Return the error for data of which every row was dropped."""
    return DataError(
        f"{where}: all {count:,} rows from here on are dropped ({reasons}), so none remains; shorten them, or raise "
        "the length"
    )


def too_long(where: str, prompt: int, response: int, max_length: int, response_name: str = "response") -> DataError:
    """Return the error for a row of more than `max_length` tokens: `prompt` and `response` of them."""
    return DataError(
        f"{where}: {prompt + response} tokens (prompt {prompt}, {response_name} {response}), but max_length is "
        f"{max_length}: shorten it, raise max_length, or set truncation to drop, left or right"
    )


def check_options(limit: int, truncation: str, choices: Sequence[str] = get_args(Truncation)) -> None:
    """Check an encoder's arguments.

    Raises:
        ValueError: a length below 1, or an unknown `truncation`.
    """
    if limit < 1:
        raise ValueError(f"the longest sequence must be at least 1 token, got {limit}")
    if truncation not in choices:
        raise ValueError(f"truncation must be one of {', '.join(choices)}, got {truncation!r}")
