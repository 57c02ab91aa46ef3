"""Encode recorded rollouts as sequences with Monte-Carlo returns, for value pretraining.

A row is a response of a PPO run, as `rollouts/*.jsonl` of the run's folder has it. The sampled token ids are used as
they are: text that is tokenized again can give other tokens than the policy produced.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from icegrt.data.examples import SkippedRow
from icegrt.data.open import open_rows
from icegrt.data.rows import LazyRows, Row, type_name
from icegrt.errors import DataError
from icegrt.utils.values import is_float32_number, is_number

ROLLOUTS = "rollouts"  # the folder of a run


@dataclass(frozen=True)
class ValueExample:
    """A response as tokens, with the return from every token on. `returns`: one fp64 number per response token."""

    prompt: list[int]
    response: list[int]
    returns: list[float]
    where: str
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def monte_carlo_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    """Return the returns at lambda 1, G_t = r_t + gamma * G_(t+1), with G = 0 after the last token."""
    returns, following = [0.0] * len(rewards), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        following = rewards[t] + gamma * following
        returns[t] = following
    return returns


class RolloutEncoder:
    """Encode rows of rollouts as `ValueExample`s of at most `max_length` tokens.

    The reward of a token is the weighted sum of its `token_rewards` over the reward sources. The total `score` is paid
    at the last token. Rows of dropped responses, and responses without a token, are skipped.

    Args:
        vocab_size: of the model; larger ids are refused.
        max_length: tokens of prompt and response.
        gamma: discount of the returns.
    """

    def __init__(self, vocab_size: int, max_length: int, gamma: float = 1.0) -> None:
        self.vocab_size, self.max_length, self.gamma = vocab_size, max_length, gamma

    def __call__(self, rows: Sequence[Row]) -> list[ValueExample | SkippedRow]:
        """Return an example or a `SkippedRow` for each row.

        Raises:
            DataError: a row cannot be used; it names file, line and key.
        """
        return [self._encode(row) for row in rows]

    def _encode(self, row: Row) -> ValueExample | SkippedRow:
        if row.get("dropped"):
            return SkippedRow("dropped by a reward source")
        prompt, response = self._ids(row, "prompt_ids"), self._ids(row, "response_ids")
        if not prompt:
            raise DataError(f"{row.where}: `prompt_ids` is empty; a response needs a prompt")
        if not response:
            return SkippedRow("without a response token")
        if len(prompt) + len(response) > self.max_length:
            raise DataError(
                f"{row.where}: {len(prompt) + len(response)} tokens (prompt {len(prompt)}, response {len(response)}), "
                f"but the model's context is {self.max_length}; take a model with a longer context"
            )
        rewards = _token_rewards(row, len(response))
        rewards[-1] += _number(row, "score", row.get("score"))
        return ValueExample(prompt, response, monte_carlo_returns(rewards, self.gamma), row.where)

    def _ids(self, row: Row, key: str) -> list[int]:
        ids = row.get(key)
        if not isinstance(ids, list) or any(type(token) is not int for token in ids):
            found = "is missing" if ids is None else f"is {type_name(ids)}"
            raise DataError(
                f"{row.where}: `{key}` {found}; expected a list of token ids, as in the files under `rollouts/` of a "
                "PPO run"
            )
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"{row.where}: `{key}` has the token {token}, but the model's vocabulary has {self.vocab_size} "
                    "tokens: the rollouts are of a model with another tokenizer"
                )
        return ids


def _token_rewards(row: Row, length: int) -> list[float]:
    rewards = [0.0] * length
    sources = row.get("sources") or {}
    if not isinstance(sources, dict):
        raise DataError(f"{row.where}: `sources` is {type_name(sources)}; expected a mapping of reward sources")
    for name, source in sources.items():
        token_rewards: Any = source.get("token_rewards") if isinstance(source, dict) else None
        if token_rewards is None:
            continue
        key = f"sources.{name}.token_rewards"
        if not isinstance(token_rewards, list) or len(token_rewards) != length:
            raise DataError(f"{row.where}: `{key}` must be a list of {length} numbers, one per response token")
        weight = _number(row, f"sources.{name}.weight", source.get("weight", 1.0))
        for t, reward in enumerate(token_rewards):
            rewards[t] += weight * _number(row, f"{key}[{t}]", reward)
    return rewards


def _number(row: Row, key: str, value: Any) -> float:
    if not is_number(value) or not is_float32_number(value):
        shown = "null" if value is None else value
        raise DataError(f"{row.where}: `{key}` is {shown!r}, not a finite number; remove the row, or score it again")
    return float(value)


def run_folder(path: str) -> Path:
    """Return the run whose folder, `rollouts/` or rollout file `path` is."""
    place = Path(path)
    while place.is_file() or place.name == ROLLOUTS:
        place = place.parent
    return place


def open_rollouts(path: str) -> Sequence[Row]:
    """Return the rows of a rollout file, or of all rollout files of a run, in order; they are read on access.

    Args:
        path: the run's folder, its `rollouts/`, or a file.

    Raises:
        DataError: a folder has no rollouts, or a file cannot be read.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        return open_rows(path)
    inner = folder / ROLLOUTS if (folder / ROLLOUTS).is_dir() else folder
    files = sorted(inner.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder}: holds no `rollouts/*.jsonl`; name the folder of a PPO run, or its files")
    return _ConcatRows([open_rows(file) for file in files])


class _ConcatRows(LazyRows):
    """The rows of several files, one after another."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(map(len, self._parts)))
        self.nbytes = sum(getattr(part, "nbytes", 0) for part in self._parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> Row:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]
