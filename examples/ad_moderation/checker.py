"""The rule checker: grades an answer to an ad between 0 and 1, from the ad's text alone or from the row's truth.

Unlike a classifier's right or wrong, the grade is continuous (a nearly exact quote earns part of its share), because
samples of one prompt are ranked with it: rule .3, quote .35, rewrite .35, all multiplied by the form. What keeps each
share from being had cheaply is said beside it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import pairwise

from ad_moderation.ads import APPROVE, RULE_BY_NUMBER, Truth, broken_rules, moderate
from ad_moderation.phrases import Rule

RULE_SHARE, QUOTE_SHARE, REWRITE_SHARE = 0.3, 0.35, 0.35
INEXACT_QUOTE = 0.7  # the most that a quote earns that is not the sentence, letter by letter
WRONG_RULE = 0.4  # the whole answer's factor where the rule is wrong: its explanation misleads
LOOSE_FORM = 0.6
TRUNCATED = 0.5

_STRICT = re.compile(r'Rule (\d+): ([a-z ]+)\.\nQuote: "([^"\n]*)"\nRewrite: ([^\n]+)')
_RULE_LINE = re.compile(r"^Rule (\d+): ([^\n]*?)\.?$", re.MULTILINE)
_QUOTE_LINE = re.compile(r'^Quote: "?([^"\n]*)"?', re.MULTILINE)
_REWRITE_LINE = re.compile(r"^Rewrite: ([^\n]*)", re.MULTILINE)


@dataclass(frozen=True)
class CheckResult:
    """`score` in [0, 1] and what it is made of: verdict, rule, quote, rewrite and form, each in [0, 1]."""

    score: float
    parts: dict[str, float]


def truth_of(ad: Mapping | str) -> Truth:
    """The truth of a row (its columns rule, sentence, product, topic) or, given a prompt, what the detectors find."""
    if isinstance(ad, str):
        return moderate(ad)
    missing = [key for key in ("rule", "sentence", "product", "topic") if key not in ad]
    if missing:
        return moderate(ad["prompt"])
    return Truth(int(ad["rule"]), ad["sentence"], ad["product"], ad["topic"])


def check(ad: Mapping | str, answer: str, truncated: bool = False) -> CheckResult:
    """Grades `answer` to `ad` (a row, or the prompt's text); `truncated` says that it ended without its end token."""
    truth = truth_of(ad)
    approves = answer.startswith(APPROVE)
    if truth.rule == 0 or approves:
        # Nothing but the one word: text after it would be a second answer to fall back on.
        form = 1.0 if answer.strip() == APPROVE else LOOSE_FORM
        verdict = float(approves and truth.rule == 0)
        return _result(verdict * form, truncated, verdict=verdict, form=form)
    number, name, quote, rewrite, form = _parse(answer)
    rule = RULE_BY_NUMBER[truth.rule]
    right = float(number == rule.number and name == rule.name)
    quoted = grade_quote(quote, truth.sentence)
    rewritten = grade_rewrite(rewrite, truth, rule)
    score = form * (RULE_SHARE * right + QUOTE_SHARE * quoted + REWRITE_SHARE * rewritten)
    score *= 1.0 if right else WRONG_RULE
    verdict = float(number is not None)
    return _result(score, truncated, verdict=verdict, rule=right, quote=quoted, rewrite=rewritten, form=form)


def grade_quote(quote: str, sentence: str) -> float:
    """1 for the offending sentence itself; less than INEXACT_QUOTE for anything else, 0 at half the letters.

    More than one sentence earns nothing: the whole ad has every sentence in it. The likeness counts both lengths.
    """
    if quote == sentence:
        return 1.0
    if ". " in quote:
        return 0.0
    return INEXACT_QUOTE * max(0.0, 2 * _likeness(quote, sentence) - 1)


def grade_rewrite(rewrite: str, truth: Truth, rule: Rule) -> float:
    """Product .4, topic .3, disclosure .3, times the wording; 0 where the rewrite itself breaks any rule.

    The wording is the share of neighbouring words that the policy's compliant sentences have side by side: lists of
    the right words, garbage and padding lower it.
    """
    if not rewrite.strip() or broken_rules(rewrite):
        return 0.0
    named = 0.4 * _mention(rewrite, truth.product) + 0.3 * _mention(rewrite, truth.topic)
    disclosed = 0.3 * float(re.search(rf"\b(?:{rule.disclosure})\b", rewrite.lower()) is not None)
    return (named + disclosed) * _wording(rewrite, truth, rule)


def _result(score: float, truncated: bool, **parts: float) -> CheckResult:
    return CheckResult(round(score * (TRUNCATED if truncated else 1.0), 6), parts)


def _parse(answer: str) -> tuple[int | None, str, str, str, float]:
    """(rule number, rule name, quote, rewrite, form): strict form 1, otherwise what can be read, at LOOSE_FORM."""
    strict = _STRICT.fullmatch(answer.rstrip("\n"))
    if strict:
        number, name, quote, rewrite = strict.groups()
        return int(number[:4]), name, quote, rewrite, 1.0
    rule, quote, rewrite = (pattern.search(answer) for pattern in (_RULE_LINE, _QUOTE_LINE, _REWRITE_LINE))
    number, name = (int(rule.group(1)[:4]), rule.group(2)) if rule else (None, "")
    return number, name, quote.group(1) if quote else "", rewrite.group(1) if rewrite else "", LOOSE_FORM


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def _mention(text: str, value: str) -> float:
    """1 where the text has the value as whole words; at most .5 for the most similar run of as many words."""
    if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text):
        return 1.0
    words, size = text.rstrip(".").split(), len(value.split())
    runs = (" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))
    return 0.5 * max(0.0, 2 * max((_likeness(run, value) for run in runs), default=0.0) - 1)


def _neighbours(sentence: str) -> list[tuple[str, str]]:
    words = ["<", *sentence.split(), ">"]
    return list(pairwise(words))


@cache
def _compliant_neighbours(number: int) -> frozenset[tuple[str, str]]:
    patterns = RULE_BY_NUMBER[number].rewrites
    return frozenset(pair for pattern in patterns for pair in _neighbours(pattern))


def _wording(rewrite: str, truth: Truth, rule: Rule) -> float:
    """Share of neighbouring words known from compliant sentences; repeated pairs count as unknown."""
    pairs = _neighbours(rewrite.replace(truth.product, "{p}").replace(truth.topic, "{t}"))
    known = _compliant_neighbours(rule.number)
    share = len(known.intersection(pairs)) / len(pairs)
    return share if rewrite.endswith(".") and rewrite.count(".") == 1 else LOOSE_FORM * share
