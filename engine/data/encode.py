"""Rows to token lists for supervised data (SFT, ptx) and for prompts (sample, PPO, generate).

The `*s` functions take many rows and tokenise them together; the single ones are the same code on one row. What does
not fit the context is refused with its lengths, dropped, or (supervised data only) cut at the end of the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from icegrt.data.dialogue import prompt_dialogue, training_dialogue
from icegrt.data.render import Segment, prompt_tokens, segments
from icegrt.data.rows import Row
from icegrt.errors import DataError

TooLong = Literal["error", "drop", "truncate"]
Progress = Callable[[int, int], None]  # rows done, rows in all
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
    """A prompt to answer: its tokens (generation prompt included), and the row, all of whose columns are kept."""

    tokens: list[int]
    where: str
    row: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)


def encode_example(tokenizer: Any, row: Row, max_length: int) -> Example:
    """One row of `messages`, or of `prompt` and `response`, as tokens: at most `max_length` of them.

    Loss is on every assistant turn, EOS included; the prompt is everything before the first one. Raises `DataError`
    naming file, line and key.
    """
    return encode_examples(tokenizer, [row], max_length)[0]


def encode_examples(
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    too_long: TooLong = "error",
    progress: Progress | None = None,
) -> list[Example]:
    """`encode_example` of many rows. `too_long` says what becomes of a row of more than `max_length` tokens.

    "error" refuses it, "drop" leaves it out, "truncate" cuts the response (no EOS is added then) and drops the row
    where no trained token is left. Raises `DataError` also where no row remains.
    """
    check_options(max_length, too_long, ("error", "drop", "truncate"))
    examples: list[Example] = []
    for chunk in chunks(rows, progress):
        for row, segment in zip(chunk, segments(tokenizer, [training_dialogue(row) for row in chunk]), strict=True):
            example = Example(segment.prompt, segment.response, segment.action_mask, row.where, row.data)
            if len(example) > max_length:
                if too_long == "error":
                    raise DataError(
                        f"{row.where}: {len(example)} tokens (prompt {len(example.prompt)}, response "
                        f"{len(example.response)}), but max_length is {max_length}: shorten it, raise max_length, "
                        'or set too_long to "drop" or "truncate"'
                    )
                example = _truncate(segment, row, max_length) if too_long == "truncate" else None
            if example is not None:
                examples.append(example)
    return some_left(examples, rows, max_length)


def encode_prompt(tokenizer: Any, row: Row, max_prompt: int, *, chat: bool = True, why: str = "") -> list[int]:
    """Tokens of a row's prompt: `prompt` (string or messages), else `messages` without a final assistant turn.

    With a chat template (and `chat` on) a string becomes a user message; without, it is plain text. Raises `DataError`
    for an empty prompt and for one of more than `max_prompt` tokens; `why` tells people where that limit comes from
    ("context 512 - max_new_tokens 88 leaves 424").
    """
    return encode_prompts(tokenizer, [row], max_prompt, chat=chat, why=why)[0].tokens


def encode_prompts(
    tokenizer: Any,
    rows: Sequence[Row],
    max_prompt: int,
    too_long: Literal["error", "drop"] = "error",
    progress: Progress | None = None,
    *,
    chat: bool = True,
    why: str = "",
) -> list[Prompt]:
    """`encode_prompt` of many rows; `too_long="drop"` leaves out what does not fit. A prompt is never cut."""
    check_options(max_prompt, too_long, ("error", "drop"))
    why = why or f"at most {max_prompt} fit"
    prompts: list[Prompt] = []
    for chunk in chunks(rows, progress):
        encoded = prompt_tokens(tokenizer, [prompt_dialogue(row) for row in chunk], chat=chat)
        for row, tokens in zip(chunk, encoded, strict=True):
            if len(tokens) <= max_prompt:
                prompts.append(Prompt(tokens, row.where, row.data))
            elif too_long == "error":
                raise DataError(
                    f"{row.where}: prompt of {len(tokens)} tokens, but {why}: shorten it, or lower max_new_tokens"
                )
    return some_left(prompts, rows, max_prompt)


def describe_lengths(examples: Sequence[Any], dropped: int = 0) -> str:
    """One line on examples, prompts or rankings (whatever has a length in tokens): rows, tokens, mean, p95, longest."""
    lengths = np.array([len(example) for example in examples], dtype=np.int64)
    if not lengths.size:
        return f"0 rows, {dropped:,} dropped"
    line = (
        f"{lengths.size:,} rows, {lengths.sum():,} tokens, length mean {lengths.mean():.1f}, "
        f"p95 {np.percentile(lengths, 95):.0f}, max {lengths.max():,}, {dropped:,} dropped"
    )
    truncated = sum(getattr(example, "truncated", False) for example in examples)
    return f"{line}, {truncated:,} truncated" if truncated else line


def chunks(rows: Sequence[Row], progress: Progress | None):
    """Rows in runs of `CHUNK_ROWS`, telling `progress` after each: long data shows life, and memory stays flat."""
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]
        if progress is not None:
            progress(min(start + CHUNK_ROWS, len(rows)), len(rows))


def some_left(kept: list, rows: Sequence[Row], limit: int) -> list:
    """`kept`, unless every row was left out: then a `DataError`."""
    if rows and not kept:
        raise DataError(
            f"{rows[0].where}: all {len(rows)} rows from here on are longer than {limit} tokens; none is left"
        )
    return kept


def check_options(limit: int, too_long: str, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` for a length below 1 or an unknown `too_long`."""
    if limit < 1:
        raise ValueError(f"the longest sequence must be at least 1 token, got {limit}")
    if too_long not in choices:
        raise ValueError(f"too_long must be one of {', '.join(choices)}, got {too_long!r}")


def _truncate(segment: Segment, row: Row, max_length: int) -> Example | None:
    room = max_length - len(segment.prompt)
    mask = segment.action_mask and segment.action_mask[: max(room, 0)]
    if room < 1 or (mask is not None and not any(mask)):
        return None
    mask = None if mask is None or all(mask) else mask
    return Example(segment.prompt, segment.response[:room], mask, row.where, row.data, truncated=True)
