"""Reward functions of the demo: the checker's scores in [0, 1], alone or with parts paid where they are decided."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from icegrt import RewardResult

# icegrt loads this file by its path, so its package may not be importable yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ad_moderation.ads import APPROVE, RULE_BY_NUMBER, Truth
from ad_moderation.checker import QUOTE_WEIGHT, REWRITE_WEIGHT, RULE_WEIGHT, WRONG_RULE, CheckResult, check, truth_of

PARTS = 4  # rule, quote, rewrite, and what is left of the score


def checker_reward(samples: Sequence[Any]) -> list[float]:
    """Return the checker's score of each sample.

    `row` is the data row with the truth columns. Without them the truth is computed from the row's prompt.
    """
    return [_check(sample).score for sample in samples]


def parts_reward(samples: Sequence[Any]) -> list[RewardResult]:
    """Return the checker's score of each sample, and token rewards that pay its parts where they are decided.

    The engine pays the score at the last token. The token rewards move each part of it to the token that decides it:
    the first that departs from all correct lines, or the last of a correct line. From each part they subtract its mean
    over the other answers to the same prompt. A baseline from other answers leaves the expected gradient as it is.

    The tokenizer is the one that prepare.py wrote beside the rows.
    """
    results = [_check(sample) for sample in samples]
    part_NP = np.array([_parts(result) for result in results])
    group_N = np.array([sample.group for sample in samples])
    rewards = []
    for n, (sample, result) in enumerate(zip(samples, results, strict=True)):
        others_N = group_N == sample.group
        others_N[n] = False
        baseline_P = part_NP[others_N].mean(0) if others_N.any() else np.zeros(PARTS)
        reward_A = np.zeros(len(sample.tokens))
        np.add.at(reward_A, _positions(sample), part_NP[n] - baseline_P)
        reward_A[-1] -= result.score  # which the engine pays there
        rewards.append(RewardResult(result.score, result.parts, reward_A.tolist()))
    return rewards


def _check(sample: Any) -> CheckResult:
    return check(sample.row, sample.text, sample.finish_reason == "length")


def _parts(result: CheckResult) -> tuple[float, float, float, float]:
    """Return what rule, quote and rewrite contribute to the score, and what is left of it."""
    parts = result.parts
    quote, rewrite = QUOTE_WEIGHT * parts.get("quote", 0.0), REWRITE_WEIGHT * parts.get("rewrite", 0.0)
    # A wrong rule lowers the other parts too: that is decided by the rule's line.
    rule = RULE_WEIGHT * parts["rule"] if parts.get("rule") else -(1 - WRONG_RULE) * (quote + rewrite)
    return rule, quote, rewrite, result.score - rule - quote - rewrite


def _positions(sample: Any) -> np.ndarray:
    """Return the position of the token that decides each part, [P] int64."""
    last = len(sample.tokens) - 1
    correct, approves = _correct_lines(truth_of(sample.row)), sample.text.startswith(APPROVE)
    if approves or not correct:  # the verdict decides all
        return np.full(PARTS, last if approves else 0)
    characters, start = [], 0
    for line, options in zip(sample.text.split("\n"), correct, strict=False):
        characters.append(start + max(_agreement(line, option) for option in options))
        start += len(line) + 1
    text_of = _token_texts(sample.where.rpartition(":")[0])
    end_A = np.cumsum([len(text_of[token]) for token in sample.tokens])
    position = np.searchsorted(end_A, characters, side="right").clip(max=last)
    return np.concatenate([position, np.full(PARTS - len(position), last)])


def _agreement(line: str, option: str) -> int:
    """Return the length of the common prefix."""
    pairs = zip(line, option, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(line), len(option)))


def _correct_lines(truth: Truth) -> list[set[str]]:
    """Return the correct wordings of each line; none for a compliant ad."""
    if truth.rule == 0:
        return []
    rule = RULE_BY_NUMBER[truth.rule]
    rewrites = {"Rewrite: " + pattern.format(p=truth.product, t=truth.topic) for pattern in rule.rewrites}
    return [{f"Rule {rule.number}: {rule.name}."}, {f'Quote: "{truth.sentence}"'}, rewrites]


@cache
def _token_texts(rows: str) -> list[str]:
    """Return the text of every token; markers have none."""
    tokenizer = Tokenizer.from_file(str(Path(rows).parent / "tokenizer" / "tokenizer.json"))
    return [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
