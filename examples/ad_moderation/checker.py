"""The rule checker: score an answer to an ad between 0 and 1, from the ad's text or from the row's truth.

    score = form * (0.3 rule + 0.35 quote + 0.35 rewrite), lower for a wrong rule or a truncated answer

The score is continuous (a nearly exact quote counts in part), because it ranks the samples of a prompt. Comments beside
each part explain how it resists cheap answers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import pairwise

from ad_moderation.ads import APPROVE, RULE_BY_NUMBER, Truth, broken_rules, moderate
from ad_moderation.phrases import Rule

RULE_WEIGHT, QUOTE_WEIGHT, REWRITE_WEIGHT = 0.3, 0.35, 0.35
INEXACT_QUOTE = 0.7  # largest score of a quote that differs from the sentence
WRONG_RULE = 0.4  # factor of an answer with the wrong rule, whose explanation misleads
LOOSE_FORM = 0.6  # factor of an answer in another form
TRUNCATED = 0.5  # factor of a truncated answer

_STRICT = re.compile(r'Rule (\d+): ([a-z ]+)\.\nQuote: "([^"\n]*)"\nRewrite: ([^\n]+)')
_RULE_LINE = re.compile(r"^Rule (\d+): ([^\n]*?)\.?$", re.MULTILINE)
_QUOTE_LINE = re.compile(r'^Quote: "?([^"\n]*)"?', re.MULTILINE)
_REWRITE_LINE = re.compile(r"^Rewrite: ([^\n]*)", re.MULTILINE)


@dataclass(frozen=True)
class CheckResult:
    """`score` in [0, 1] and its parts: verdict, rule, quote, rewrite and form, each in [0, 1]."""

    score: float
    parts: dict[str, float]


def truth_of(ad: Mapping | str) -> Truth:
    """Return the truth of a row from its columns rule, sentence, product and topic, or of a prompt by `moderate`."""
    if isinstance(ad, str):
        return moderate(ad)
    missing = [key for key in ("rule", "sentence", "product", "topic") if key not in ad]
    if missing:
        return moderate(ad["prompt"])
    return Truth(int(ad["rule"]), ad["sentence"], ad["product"], ad["topic"])


def check(ad: Mapping | str, answer: str, truncated: bool = False) -> CheckResult:
    """Score `answer` to `ad` (a row, or the prompt's text). `truncated`: the answer has no end token."""
    truth = truth_of(ad)
    approves = answer.startswith(APPROVE)
    if truth.rule == 0 or approves:
        # Only the one word has the full score: text after it could be a second answer.
        form = 1.0 if answer.strip() == APPROVE else LOOSE_FORM
        verdict = float(approves and truth.rule == 0)
        return _result(verdict * form, truncated, verdict=verdict, form=form)
    number, name, quote, rewrite, form = _parse(answer)
    rule = RULE_BY_NUMBER[truth.rule]
    rule_score = float(number == rule.number and name == rule.name)
    quote_score = score_quote(quote, truth.sentence)
    rewrite_score = score_rewrite(rewrite, truth, rule)
    score = form * (RULE_WEIGHT * rule_score + QUOTE_WEIGHT * quote_score + REWRITE_WEIGHT * rewrite_score)
    score *= 1.0 if rule_score else WRONG_RULE
    verdict = float(number is not None)
    return _result(
        score, truncated, verdict=verdict, rule=rule_score, quote=quote_score, rewrite=rewrite_score, form=form
    )


def score_quote(quote: str, sentence: str) -> float:
    """Return 1 for the offending sentence, at most INEXACT_QUOTE for a similar text, 0 below a similarity of 0.5.

    Several sentences get 0, as the complete ad contains every sentence. The similarity counts both lengths.
    """
    if quote == sentence:
        return 1.0
    if ". " in quote:
        return 0.0
    return INEXACT_QUOTE * max(0.0, 2 * _similarity(quote, sentence) - 1)


def score_rewrite(rewrite: str, truth: Truth, rule: Rule) -> float:
    """Return (0.4 product + 0.3 topic + 0.3 disclosure) * wording; 0 if the rewrite itself breaks a rule.

    The wording is the fraction of word pairs that are adjacent in the policy's compliant sentences too. Lists of the
    right words, garbage and padding lower it.
    """
    if not rewrite.strip() or broken_rules(rewrite):
        return 0.0
    mentions = 0.4 * _mention(rewrite, truth.product) + 0.3 * _mention(rewrite, truth.topic)
    disclosure = 0.3 * float(re.search(rf"\b(?:{rule.disclosure})\b", rewrite.lower()) is not None)
    return (mentions + disclosure) * _wording(rewrite, truth, rule)


def _result(score: float, truncated: bool, **parts: float) -> CheckResult:
    return CheckResult(round(score * (TRUNCATED if truncated else 1.0), 6), parts)


def _parse(answer: str) -> tuple[int | None, str, str, str, float]:
    """Return (rule number, rule name, quote, rewrite, form). form: 1 for exactly the three lines, else LOOSE_FORM."""
    strict = _STRICT.fullmatch(answer.rstrip("\n"))
    if strict:
        number, name, quote, rewrite = strict.groups()
        return int(number[:4]), name, quote, rewrite, 1.0
    rule, quote, rewrite = (pattern.search(answer) for pattern in (_RULE_LINE, _QUOTE_LINE, _REWRITE_LINE))
    number, name = (int(rule.group(1)[:4]), rule.group(2)) if rule else (None, "")
    return number, name, quote.group(1) if quote else "", rewrite.group(1) if rewrite else "", LOOSE_FORM


def _similarity(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def _mention(text: str, value: str) -> float:
    """Return 1 if the text has the value as complete words; at most 0.5 for the most similar run of as many words."""
    if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text):
        return 1.0
    words, size = text.rstrip(".").split(), len(value.split())
    runs = (" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))
    return 0.5 * max(0.0, 2 * max((_similarity(run, value) for run in runs), default=0.0) - 1)


def _word_pairs(sentence: str) -> list[tuple[str, str]]:
    words = ["<", *sentence.split(), ">"]
    return list(pairwise(words))


@cache
def _compliant_pairs(number: int) -> frozenset[tuple[str, str]]:
    patterns = RULE_BY_NUMBER[number].rewrites
    return frozenset(pair for pattern in patterns for pair in _word_pairs(pattern))


def _wording(rewrite: str, truth: Truth, rule: Rule) -> float:
    """Return the fraction of adjacent words that occur in compliant sentences; a repeated pair counts once."""
    pairs = _word_pairs(rewrite.replace(truth.product, "{p}").replace(truth.topic, "{t}"))
    fraction = len(_compliant_pairs(rule.number).intersection(pairs)) / len(pairs)
    return fraction if rewrite.endswith(".") and rewrite.count(".") == 1 else LOOSE_FORM * fraction
