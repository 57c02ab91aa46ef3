"""Encode rows as rankings: the responses of one prompt with a score each, for the reward model's pairwise loss.

Accepted rows: a prompt with `responses` and `scores` (higher is better) or `ranks` (1 is best); or `chosen` and
`rejected`, strings beside a prompt or lists of messages. If `response_ids` holds the sampled tokens, those are used:
decoding and tokenizing again can give other tokens than the policy produced. Ids that do not decode to the response's
text give way to the text; ids that the tokenizer lacks do so with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from icegrt.data.conversation import (
    Conversation,
    checked_text,
    preference_conversations,
    prompt_column,
    prompt_conversation,
    unknown_shape,
)
from icegrt.data.examples import SkippedRow, Truncation, check_options, too_long
from icegrt.data.rows import Row
from icegrt.data.tokenization import TokenizedExample, tokenize_conversations
from icegrt.data.tokenizer import eos_id
from icegrt.errors import DataError
from icegrt.utils.console import warn
from icegrt.utils.values import FLOAT32_MAX, is_float32_number, is_number

SHAPES = "`prompt` with `responses` and `scores` or `ranks`, or `prompt` with `chosen` and `rejected`"


@dataclass(frozen=True)
class Ranking:
    """K responses of one prompt, as tokens, with a score for each (higher is better; a rank becomes -rank)."""

    prompt: list[int]
    responses: list[list[int]]
    scores: list[float]
    where: str
    truncated: bool = False

    def __len__(self) -> int:
        """Return the tokens of all K sequences; each counts the prompt."""
        return len(self.prompt) * len(self.responses) + sum(map(len, self.responses))


@dataclass(frozen=True)
class _RankedRow:
    """A row's responses before tokenization; every list has one entry per response.

    `sampled_ids`: the ids to use verbatim, or None. `hit_limit`: sampling ended at its length limit, without EOS.
    """

    row: Row
    conversations: list[Conversation]
    scores: list[float]
    sampled_ids: list[list[int] | None]
    hit_limit: list[bool]


class RankingEncoder:
    """Encode rows as `Ranking`s; prompt and longest response together have at most `max_length` tokens.

    The chat template renders a response of text, with EOS unless its `finish_reasons` entry is "length".

    truncation, for a longer row: "error" raises, "drop" drops the prompt with all its responses, "left" truncates the
    prompt's beginning, "right" the ends of the responses (and adds no EOS). A prompt whose responses become equal is
    dropped too.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, truncation: Truncation = "error", stop_ids: Collection[int] = ()
    ) -> None:
        check_options(max_length, truncation)
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation
        self.stop_ids = frozenset(stop_ids)
        self._has_warned = False

    def __call__(self, rows: Sequence[Row]) -> list[Ranking | SkippedRow]:
        """Return a ranking or a `SkippedRow` for each row.

        Raises:
            DataError: a row cannot be used; it names file, line and key.
        """
        ranked_rows = [_read(self.tokenizer, row, self._warn_of_unknown_id) for row in rows]
        conversations = [conversation for ranked in ranked_rows for conversation in ranked.conversations]
        tokenized = iter(tokenize_conversations(self.tokenizer, conversations, self.stop_ids))
        return [
            self._fit(self._ranking(ranked, [next(tokenized) for _ in ranked.conversations])) for ranked in ranked_rows
        ]

    def _warn_of_unknown_id(self, where: str, token: int) -> None:
        """Warn of the first response id that the tokenizer lacks."""
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"{where}: token {token} is not in the tokenizer of {len(self.tokenizer)} tokens; responses with such "
                "ids are tokenized from their text. Use the tokenizer of the model that sampled them to keep the ids"
            )

    def _ranking(self, ranked: _RankedRow, tokenized: list[TokenizedExample]) -> Ranking:
        stops = {eos_id(self.tokenizer), *self.stop_ids}
        responses = []
        for example, sampled_ids, hit_limit in zip(tokenized, ranked.sampled_ids, ranked.hit_limit, strict=True):
            tokens = example.response if sampled_ids is None else sampled_ids
            if sampled_ids is None and hit_limit and len(tokens) > 1 and tokens[-1] in stops:
                tokens = tokens[:-1]  # sampling ended at the length limit: the policy never sampled this EOS
            responses.append(tokens)
        return Ranking(tokenized[0].prompt, responses, ranked.scores, ranked.row.where)

    def _fit(self, ranking: Ranking) -> Ranking | SkippedRow:
        prompt, longest = len(ranking.prompt), max(map(len, ranking.responses))
        if prompt + longest <= self.max_length:
            return ranking
        if self.truncation == "error":
            raise too_long(ranking.where, prompt, longest, self.max_length, "longest response")
        prompt_tokens, responses = ranking.prompt, ranking.responses
        if self.truncation == "left":
            prompt_tokens = prompt_tokens[-max(self.max_length - longest, 0) :]
        if self.truncation == "right":
            responses = [tokens[: max(self.max_length - prompt, 0)] for tokens in responses]
        fits = len(prompt_tokens) + max(map(len, responses)) <= self.max_length
        if self.truncation == "drop" or not fits or not all(responses):
            return SkippedRow(f"longer than {self.max_length} tokens")
        if all(tokens == responses[0] for tokens in responses):
            return SkippedRow("whose responses are equal once truncated")
        return Ranking(prompt_tokens, responses, ranking.scores, ranking.where, truncated=True)


def untied_pairs(
    scores: Sequence[float], margin: float = 0.0, responses: Sequence[list[int]] | None = None
) -> list[tuple[int, int]]:
    """Return every (winner, loser) whose scores differ, by at least `margin`; empty if all responses tie.

    Two of `responses` with the same tokens are no pair: a model gives them one score.
    """
    return [
        (i, j)
        for i, winner in enumerate(scores)
        for j, loser in enumerate(scores)
        if winner > loser and winner - loser >= margin and (responses is None or responses[i] != responses[j])
    ]


def _read(tokenizer: Any, row: Row, warn_of_unknown_id: Callable[[str, int], None]) -> _RankedRow:
    has_list = row.get("responses") is not None
    has_pair = row.get("chosen") is not None and row.get("rejected") is not None
    if has_list and has_pair:
        raise DataError(f"{row.where}: has `responses` and `chosen`/`rejected`: keep one of them")
    if has_pair and (prompt_column(row) is not None or isinstance(row.get("chosen"), list)):
        return _RankedRow(row, list(preference_conversations(row)), [1.0, 0.0], [None, None], [False, False])
    if not has_list or (prompt_column(row) is None and row.get("messages") is None):
        raise unknown_shape(row, SHAPES)
    texts = _list(row, "responses")
    if len(texts) < 2:
        raise DataError(f"{row.where}: key `responses`: expected at least 2 to compare, got {len(texts)}")
    texts = [checked_text(row, f"responses[{i}]", text) for i, text in enumerate(texts)]
    prompt, scores = prompt_conversation(row), _preferences(row, len(texts))
    conversations = [prompt.with_answer(text) for text in texts]
    hit_limit = [False] * len(texts)
    if row.get("finish_reasons") is not None:
        hit_limit = [reason == "length" for reason in _list(row, "finish_reasons", len(texts))]
    return _RankedRow(row, conversations, scores, _sampled_ids(tokenizer, row, texts, warn_of_unknown_id), hit_limit)


def _list(row: Row, key: str, length: int | None = None) -> list:
    value = row.get(key)
    if not isinstance(value, list):
        raise DataError(f"{row.where}: key `{key}`: expected a list, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise DataError(f"{row.where}: key `{key}`: {len(value)} entries for {length} responses; expected one for each")
    return value


def _preferences(row: Row, length: int) -> list[float]:
    """Return a number per response, higher is better: its score, or its negated rank."""
    keys = [key for key in ("scores", "ranks") if row.get(key) is not None]
    if not keys:
        raise unknown_shape(row, SHAPES)
    if len(keys) == 2:
        raise DataError(f"{row.where}: has both `scores` and `ranks`: keep the one to learn from")
    key = keys[0]
    values = _list(row, key, length)
    for i, value in enumerate(values):
        if not is_float32_number(value):
            got = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a larger integer"
            limit = f" between +-{FLOAT32_MAX:.3g}, as float32 holds it" if is_number(value) and value == value else ""
            raise DataError(f"{row.where}: key `{key}[{i}]`: expected a finite number{limit}, got {got}")
        if key == "ranks" and value < 1:
            raise DataError(f"{row.where}: key `ranks[{i}]`: expected 1 (best) or more, got {value!r}")
    return [float(value) if key == "scores" else -float(value) for value in values]


def _sampled_ids(
    tokenizer: Any, row: Row, texts: list[str], warn_of_unknown_id: Callable[[str, int], None]
) -> list[list[int] | None]:
    """Return each response's `response_ids` if they decode to its text, else None."""
    if row.get("response_ids") is None:
        return [None] * len(texts)
    vocab_size = len(tokenizer)
    sampled_ids: list[list[int] | None] = []
    for i, (ids, text) in enumerate(zip(_list(row, "response_ids", len(texts)), texts, strict=True)):
        if not isinstance(ids, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
            raise DataError(f"{row.where}: key `response_ids[{i}]`: expected a list of token ids")
        if not ids:
            raise DataError(f"{row.where}: key `response_ids[{i}]`: is empty; a response has at least one token")
        outside = next((t for t in ids if not 0 <= t < vocab_size), None)
        if outside is not None:
            warn_of_unknown_id(f"{row.where}: key `response_ids[{i}]`", outside)
        # A user may edit text but not ids: the text decides.
        sampled_ids.append(list(ids) if outside is None and _decodes_to(tokenizer, ids, text) else None)
    return sampled_ids


def _decodes_to(tokenizer: Any, ids: list[int], text: str) -> bool:
    return any(tokenizer.decode(ids, skip_special_tokens=skip).strip() == text.strip() for skip in (True, False))
