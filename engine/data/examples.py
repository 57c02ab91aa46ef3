"""Rows to token lists for supervised data (SFT, ptx) and for prompts (sample, PPO, generate).

An encoder turns rows into items, many at once; `encode_*` are the same on rows in memory. What does not fit the context
is refused with its lengths, left out, or cut, as `truncation` says; nothing is cut unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from icegrt.data.conversation import prompt_column, prompt_dialogue, training_dialogue
from icegrt.data.rows import Row
from icegrt.data.tokenization import TokenizedExample, prompt_tokens, tokenize_conversations
from icegrt.errors import DataError

Truncation = Literal["error", "drop", "left", "right"]
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Example:
    """Supervised data: prompt and response tokens, EOS last unless `truncated`.

    `action_mask` has one bool per response token, False for what the assistant did not write (tool and user turns
    inside the response); None where every response token is the assistant's. `row` is the row's columns.
    """

    prompt: list[int]
    response: list[int]
    action_mask: list[bool] | None
    where: str
    row: dict[str, Any]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: its tokens (generation prompt included), and the row, all of whose columns are kept.

    A prompt from a column of another name stands in the row as `prompt` too.
    """

    tokens: list[int]
    where: str
    row: dict[str, Any]
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class SkippedRow:
    """Why a row was left out, in words."""

    why: str


Item = TypeVar("Item")
Encoder = Callable[[Sequence[Row]], "list[Item | SkippedRow]"]


class ExampleEncoder:
    """Rows of `messages`, or of a prompt and a response, to `Example`s of at most `max_length` tokens.

    Loss is on every assistant turn, EOS included; the prompt is everything before the first one. truncation, for a row
    of more tokens: "error" refuses it, "drop" leaves it out, "right" cuts the response (no EOS is added then), "left"
    cuts the prompt's beginning; a row that has nothing left to learn from, or no prompt, is left out.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: Truncation = "error", stop_ids: Collection[int] = ()
    ) -> None:
        check_options(max_length, truncation)
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.stop_ids = frozenset(stop_ids)

    def __call__(self, rows: Sequence[Row]) -> list[Example | SkippedRow]:
        """An example for each row, or why there is none. Raises `DataError` naming file, line and key."""
        encoded = tokenize_conversations(self.tokenizer, [training_dialogue(row) for row in rows], self.stop_ids)
        return [self._fit(row, segment) for row, segment in zip(rows, encoded, strict=True)]

    def _fit(self, row: Row, segment: TokenizedExample) -> Example | SkippedRow:
        prompt, response, mask = segment.prompt, segment.response, segment.action_mask
        over = len(prompt) + len(response) - self.max_length
        if over <= 0:
            return Example(prompt, response, mask, row.where, row.data)
        if self.truncation == "error":
            raise DataError(
                f"{row.where}: {over + self.max_length} tokens (prompt {len(prompt)}, response {len(response)}), but "
                f"max_length is {self.max_length}: shorten it, raise max_length, or set truncation to drop, left or "
                "right"
            )
        if self.truncation == "left" and over < len(prompt):
            return Example(prompt[over:], response, mask, row.where, row.data, truncated=True)
        room = self.max_length - len(prompt)
        if self.truncation == "right" and room > 0 and (mask is None or any(mask[:room])):
            mask = None if mask is None or all(mask[:room]) else mask[:room]
            return Example(prompt, response[:room], mask, row.where, row.data, truncated=True)
        return SkippedRow(f"longer than {self.max_length} tokens")


class PromptEncoder:
    """Rows to `Prompt`s of at most `max_prompt` tokens: the prompt column, else `messages` without a final answer.

    With a chat template (and `chat` on) a string becomes a user message; without, it is plain text. `why` tells people
    where the limit comes from ("context 512 - max_new_tokens 88 leaves 424"). truncation: "error", "drop", or "left",
    which cuts the beginning; a prompt's end, where the answer starts, is never cut.
    """

    def __init__(
        self, tokenizer: Any, max_prompt: int, truncation: Truncation = "error", *, chat: bool = True, why: str = ""
    ) -> None:
        check_options(max_prompt, truncation, ("error", "drop", "left"))
        self.tokenizer, self.max_prompt, self.truncation, self.chat = tokenizer, max_prompt, truncation, chat
        self.why = why or f"at most {max_prompt} fit"

    def __call__(self, rows: Sequence[Row]) -> list[Prompt | SkippedRow]:
        """A prompt for each row, or why there is none. Raises `DataError` naming file, line and key."""
        encoded = prompt_tokens(self.tokenizer, [prompt_dialogue(row) for row in rows], chat=self.chat)
        return [self._fit(row, tokens) for row, tokens in zip(rows, encoded, strict=True)]

    def _fit(self, row: Row, tokens: list[int]) -> Prompt | SkippedRow:
        key = prompt_column(row)
        data = row.data if key in (None, "prompt") else {**row.data, "prompt": row.data[key]}
        if len(tokens) <= self.max_prompt:
            return Prompt(tokens, row.where, data)
        if self.truncation == "error":
            raise DataError(
                f"{row.where}: prompt of {len(tokens)} tokens, but {self.why}: shorten it, lower max_new_tokens, or "
                "set truncation to drop or left"
            )
        if self.truncation == "left":
            return Prompt(tokens[-self.max_prompt :], row.where, data, truncated=True)
        return SkippedRow(f"longer than {self.max_prompt} tokens")


def encode_example(tokenizer: Any, row: Row, max_length: int) -> Example:
    """One row as an `Example`; a longer one than `max_length` is refused. Raises `DataError` naming file, line, key."""
    return ExampleEncoder(tokenizer, max_length)([row])[0]


def encode_examples(
    tokenizer: Any, rows: Sequence[Row], max_length: int, truncation: Truncation = "error"
) -> list[Example]:
    """Many rows as `Example`s in memory, without those that `truncation` leaves out (see `ExampleEncoder`)."""
    return kept(ExampleEncoder(tokenizer, max_length, truncation), rows)


def encode_prompt(tokenizer: Any, row: Row, max_prompt: int, *, chat: bool = True, why: str = "") -> list[int]:
    """Tokens of a row's prompt; one of more than `max_prompt` is refused. Raises `DataError` naming file, line, key."""
    return PromptEncoder(tokenizer, max_prompt, chat=chat, why=why)([row])[0].tokens


def encode_prompts(
    tokenizer: Any,
    rows: Sequence[Row],
    max_prompt: int,
    truncation: Truncation = "error",
    *,
    chat: bool = True,
    why: str = "",
) -> list[Prompt]:
    """Many rows as `Prompt`s in memory, without those that `truncation` leaves out (see `PromptEncoder`)."""
    return kept(PromptEncoder(tokenizer, max_prompt, truncation, chat=chat, why=why), rows)


def kept(encoder: Encoder, rows: Sequence[Row]) -> list:
    """The items of all rows that are not left out. Raises `DataError` where none is."""
    found: list = []
    for start in range(0, len(rows), CHUNK_ROWS):
        found += [item for item in encoder(rows[start : start + CHUNK_ROWS]) if not isinstance(item, SkippedRow)]
    if len(rows) and not found:
        raise nothing_left(rows[0].where, len(rows))
    return found


def nothing_left(where: str, count: int, reasons: str = "") -> DataError:
    """The error for data of which every row was left out."""
    why = f" ({reasons})" if reasons else ""
    return DataError(
        f"{where}: all {count:,} rows from here on are left out{why}, so none remains; shorten them, or raise the "
        "length"
    )


def check_options(limit: int, truncation: str, choices: Sequence[str] = get_args(Truncation)) -> None:
    """Raise `ValueError` for a length below 1 or an unknown `truncation`."""
    if limit < 1:
        raise ValueError(f"the longest sequence must be at least 1 token, got {limit}")
    if truncation not in choices:
        raise ValueError(f"truncation must be one of {', '.join(choices)}, got {truncation!r}")
