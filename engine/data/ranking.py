"""Rows to rankings: the responses of one prompt with a score each, for the reward model's pairwise loss.

Shapes of a row: `prompt` with `responses` and `scores` (higher is better) or `ranks` (1 is best), or with `chosen` and
`rejected`. Where `response_ids` holds the tokens as they were sampled, those are used: decoded text tokenised again
gives other tokens than the policy produced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from icegrt.data.dialogue import prompt_dialogue, text_at, unknown_shape
from icegrt.data.encode import Progress, check_options, chunks, some_left
from icegrt.data.render import segments
from icegrt.data.rows import Row
from icegrt.data.tokenizer import eos_id
from icegrt.errors import DataError

SHAPES = "`prompt` with `responses` and `scores` or `ranks`, or `prompt` with `chosen` and `rejected`"


@dataclass(frozen=True)
class Ranking:
    """K responses of one prompt, as tokens, and a score for each (higher is better; ranks become -rank)."""

    prompt: list[int]
    responses: list[list[int]]
    scores: list[float]
    where: str

    def __len__(self) -> int:
        """Tokens of all K sequences, the prompt counted in each."""
        return len(self.prompt) * len(self.responses) + sum(map(len, self.responses))


@dataclass(frozen=True)
class _Ranked:
    """A row's responses before tokenising. `sampled` holds the ids to use verbatim, or None, for each."""

    row: Row
    texts: list[str]
    scores: list[float]
    sampled: list[list[int] | None]
    cut: list[bool]


def encode_ranking(tokenizer: Any, row: Row, max_length: int) -> Ranking:
    """One row as a `Ranking`; prompt and longest response together have at most `max_length` tokens.

    A response of text gets the chat template's rendering and EOS, unless its `finish_reasons` entry is "length".
    Raises `DataError` naming file, line and key.
    """
    return encode_rankings(tokenizer, [row], max_length)[0]


def encode_rankings(
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    too_long: Literal["error", "drop"] = "error",
    progress: Progress | None = None,
) -> list[Ranking]:
    """`encode_ranking` of many rows; `too_long="drop"` leaves out a prompt one of whose responses does not fit."""
    check_options(max_length, too_long, ("error", "drop"))
    rankings: list[Ranking] = []
    for chunk in chunks(rows, progress):
        ranked = [_read(tokenizer, row) for row in chunk]
        dialogues = [prompt_dialogue(item.row).answered(text) for item in ranked for text in item.texts]
        found = iter(segments(tokenizer, dialogues))
        for item in ranked:
            ranking = _assemble(item, [next(found) for _ in item.texts], eos_id(tokenizer))
            longest = max(map(len, ranking.responses))
            if len(ranking.prompt) + longest <= max_length:
                rankings.append(ranking)
            elif too_long == "error":
                raise DataError(
                    f"{ranking.where}: {len(ranking.prompt) + longest} tokens (prompt {len(ranking.prompt)}, longest "
                    f"response {longest}), but max_length is {max_length}: shorten it, raise max_length, "
                    'or set too_long to "drop"'
                )
    return some_left(rankings, rows, max_length)


def untied_pairs(scores: Sequence[float], margin: float = 0.0) -> list[tuple[int, int]]:
    """Every (winner, loser) whose scores differ, by `margin` at least; empty where all responses tie."""
    return [
        (i, j)
        for i, winner in enumerate(scores)
        for j, loser in enumerate(scores)
        if winner > loser and winner - loser >= margin
    ]


def _assemble(item: _Ranked, encoded: list, eos: int) -> Ranking:
    responses = []
    for segment, sampled, cut in zip(encoded, item.sampled, item.cut, strict=True):
        tokens = segment.response if sampled is None else sampled
        if sampled is None and cut and len(tokens) > 1 and tokens[-1] == eos:
            tokens = tokens[:-1]  # it was cut at the length limit: the policy never wrote this EOS
        responses.append(tokens)
    return Ranking(encoded[0].prompt, responses, item.scores, item.row.where)


def _read(tokenizer: Any, row: Row) -> _Ranked:
    listed = row.get("responses") is not None
    pair = row.get("chosen") is not None and row.get("rejected") is not None
    if row.get("prompt") is None or not (listed or pair):
        raise unknown_shape(row, SHAPES)
    if listed and pair:
        raise DataError(f"{row.where}: has `responses` and `chosen`/`rejected`: keep one of them")
    if pair:
        texts = [text_at(row, key, row.get(key)) for key in ("chosen", "rejected")]
        return _Ranked(row, texts, [1.0, 0.0], [None, None], [False, False])
    texts = _list(row, "responses")
    if len(texts) < 2:
        raise DataError(f"{row.where}: key `responses`: expected at least 2 to compare, got {len(texts)}")
    texts = [text_at(row, f"responses[{i}]", text) for i, text in enumerate(texts)]
    return _Ranked(row, texts, _scores(row, len(texts)), _sampled(tokenizer, row, texts), _cut(row, len(texts)))


def _list(row: Row, key: str, length: int | None = None) -> list:
    value = row.get(key)
    if not isinstance(value, list):
        raise DataError(f"{row.where}: key `{key}`: expected a list, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise DataError(f"{row.where}: key `{key}`: {len(value)} entries for {length} responses; expected one for each")
    return value


def _scores(row: Row, length: int) -> list[float]:
    keys = [key for key in ("scores", "ranks") if row.get(key) is not None]
    if not keys:
        raise unknown_shape(row, SHAPES)
    if len(keys) == 2:
        raise DataError(f"{row.where}: has both `scores` and `ranks`: keep the one to learn from")
    key = keys[0]
    values = _list(row, key, length)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DataError(f"{row.where}: key `{key}[{i}]`: expected a finite number, got {value!r}")
        if key == "ranks" and value < 1:
            raise DataError(f"{row.where}: key `ranks[{i}]`: expected 1 (best) or more, got {value!r}")
    return [float(value) if key == "scores" else -float(value) for value in values]


def _cut(row: Row, length: int) -> list[bool]:
    if row.get("finish_reasons") is None:
        return [False] * length
    return [reason == "length" for reason in _list(row, "finish_reasons", length)]


def _sampled(tokenizer: Any, row: Row, texts: list[str]) -> list[list[int] | None]:
    if row.get("response_ids") is None:
        return [None] * len(texts)
    size = len(tokenizer)
    found: list[list[int] | None] = []
    for i, (ids, text) in enumerate(zip(_list(row, "response_ids", len(texts)), texts, strict=True)):
        if not isinstance(ids, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
            raise DataError(f"{row.where}: key `response_ids[{i}]`: expected a list of token ids")
        if not ids:
            raise DataError(f"{row.where}: key `response_ids[{i}]`: is empty; a response has at least one token")
        known = all(0 <= t < size for t in ids)
        found.append(list(ids) if known and _says(tokenizer, ids, text) else None)
    return found


def _says(tokenizer: Any, ids: list[int], text: str) -> bool:
    # Ids of another tokenizer may all lie in the vocabulary, and edited text leaves its ids behind: text decides.
    return any(tokenizer.decode(ids, skip_special_tokens=skip).strip() == text.strip() for skip in (True, False))
