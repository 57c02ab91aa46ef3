"""Rows to rankings: the responses of one prompt with a score each, for the reward model's pairwise loss.

Shapes of a row: a prompt with `responses` and `scores` (higher is better) or `ranks` (1 is best); or `chosen` and
`rejected`, strings beside a prompt or lists of messages. Where `response_ids` holds the tokens as they were sampled,
those are used: decoded text tokenised again gives other tokens than the policy produced.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from icegrt.data.conversation import (
    Conversation,
    preference_dialogues,
    prompt_column,
    prompt_dialogue,
    text_at,
    unknown_shape,
)
from icegrt.data.examples import SkippedRow, Truncation, check_options, kept
from icegrt.data.rows import Row
from icegrt.data.tokenization import TokenizedExample, tokenize_conversations
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
    truncated: bool = False

    def __len__(self) -> int:
        """Tokens of all K sequences, the prompt counted in each."""
        return len(self.prompt) * len(self.responses) + sum(map(len, self.responses))


@dataclass(frozen=True)
class _Ranked:
    """A row's responses before tokenising. `sampled` holds the ids to use verbatim, or None, for each."""

    row: Row
    conversations: list[Conversation]
    scores: list[float]
    sampled: list[list[int] | None]
    cut: list[bool]


class RankingEncoder:
    """Rows to `Ranking`s; prompt and longest response together have at most `max_length` tokens.

    A response of text gets the chat template's rendering and EOS, unless its `finish_reasons` entry is "length".
    truncation, where they have more: "error" refuses, "drop" leaves the prompt out with all its responses, "left" cuts
    the prompt's beginning, "right" the ends of the responses (no EOS is added then). A prompt whose responses no longer
    differ is left out too.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: Truncation = "error", stop_ids: Collection[int] = ()
    ) -> None:
        check_options(max_length, truncation)
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.stop_ids = frozenset(stop_ids)

    def __call__(self, rows: Sequence[Row]) -> list[Ranking | SkippedRow]:
        """A ranking for each row, or why there is none. Raises `DataError` naming file, line and key."""
        ranked = [_read(self.tokenizer, row) for row in rows]
        found = iter(
            tokenize_conversations(self.tokenizer, [d for item in ranked for d in item.conversations], self.stop_ids)
        )
        return [self._fit(self._assemble(item, [next(found) for _ in item.conversations])) for item in ranked]

    def _assemble(self, item: _Ranked, encoded: list[TokenizedExample]) -> Ranking:
        eos = eos_id(self.tokenizer)
        responses = []
        for segment, sampled, cut in zip(encoded, item.sampled, item.cut, strict=True):
            tokens = segment.response if sampled is None else sampled
            if sampled is None and cut and len(tokens) > 1 and (tokens[-1] == eos or tokens[-1] in self.stop_ids):
                tokens = tokens[:-1]  # it was cut at the length limit: the policy never wrote this EOS
            responses.append(tokens)
        return Ranking(encoded[0].prompt, responses, item.scores, item.row.where)

    def _fit(self, ranking: Ranking) -> Ranking | SkippedRow:
        prompt, longest = len(ranking.prompt), max(map(len, ranking.responses))
        if prompt + longest <= self.max_length:
            return ranking
        if self.truncation == "error":
            raise DataError(
                f"{ranking.where}: {prompt + longest} tokens (prompt {prompt}, longest response {longest}), but "
                f"max_length is {self.max_length}: shorten it, raise max_length, or set truncation to drop, "
                "left or right"
            )
        left, right = ranking.prompt, ranking.responses
        if self.truncation == "left":
            left = left[-max(self.max_length - longest, 0) :]
        if self.truncation == "right":
            right = [tokens[: max(self.max_length - prompt, 0)] for tokens in right]
        fits = len(left) + max(map(len, right)) <= self.max_length
        if self.truncation == "drop" or not fits or not all(right):
            return SkippedRow(f"longer than {self.max_length} tokens")
        if all(tokens == right[0] for tokens in right):
            return SkippedRow("responses alike once cut")
        return Ranking(left, right, ranking.scores, ranking.where, truncated=True)


def encode_ranking(tokenizer: Any, row: Row, max_length: int) -> Ranking:
    """One row as a `Ranking`; a longer one than `max_length` is refused. Raises `DataError` naming file, line, key."""
    return RankingEncoder(tokenizer, max_length)([row])[0]


def encode_rankings(
    tokenizer: Any, rows: Sequence[Row], max_length: int, truncation: Truncation = "error"
) -> list[Ranking]:
    """Many rows as `Ranking`s in memory, without those that `truncation` leaves out (see `RankingEncoder`)."""
    return kept(RankingEncoder(tokenizer, max_length, truncation), rows)


def untied_pairs(scores: Sequence[float], margin: float = 0.0) -> list[tuple[int, int]]:
    """Every (winner, loser) whose scores differ, by `margin` at least; empty where all responses tie."""
    return [
        (i, j)
        for i, winner in enumerate(scores)
        for j, loser in enumerate(scores)
        if winner > loser and winner - loser >= margin
    ]


def _read(tokenizer: Any, row: Row) -> _Ranked:
    listed = row.get("responses") is not None
    pair = row.get("chosen") is not None and row.get("rejected") is not None
    if listed and pair:
        raise DataError(f"{row.where}: has `responses` and `chosen`/`rejected`: keep one of them")
    if pair and (prompt_column(row) is not None or isinstance(row.get("chosen"), list)):
        return _Ranked(row, list(preference_dialogues(row)), [1.0, 0.0], [None, None], [False, False])
    if not listed or (prompt_column(row) is None and row.get("messages") is None):
        raise unknown_shape(row, SHAPES)
    texts = _list(row, "responses")
    if len(texts) < 2:
        raise DataError(f"{row.where}: key `responses`: expected at least 2 to compare, got {len(texts)}")
    texts = [text_at(row, f"responses[{i}]", text) for i, text in enumerate(texts)]
    prompt, scores = prompt_dialogue(row), _scores(row, len(texts))
    conversations = [prompt.with_answer(text) for text in texts]
    return _Ranked(row, conversations, scores, _sampled(tokenizer, row, texts), _cut(row, len(texts)))


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
