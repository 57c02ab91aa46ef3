"""The seeded generator of ads, and the truth about an ad computed from its text alone.

Unlike a data set, nothing is annotated: `moderate` finds the broken rule, the offending sentence, the product and the
topic with the policy's cue patterns, and `reference_answer` follows from them. The generator writes the same facts
into each row, and a test compares the two on thousands of ads.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ad_moderation.phrases import BRAND_SYLLABLES, FILLERS, KINDS, OPENERS, PARTS, RULES, Rule

APPROVE = "Approve."
PROMPT_PREFIX = "Ad: "
COMPLIANT_SHARE = 0.2
CUES = {rule.number: re.compile(rf"(?<![a-z])(?:{rule.cues})(?![a-z])") for rule in RULES}
RULE_BY_NUMBER = {rule.number: rule for rule in RULES}

_SUM = re.compile(r"\$\d[\d,]* a (?:day|week|month)")
_PERIODS = ("day", "week", "month")
_BRAND = "".join(f"(?:{'|'.join(row)})" for row in BRAND_SYLLABLES)
_PRODUCT = re.compile(rf"\b{_BRAND} (?:{'|'.join(KINDS)})\b")
# Brands dealt by checksum modulo 10: four tenths to the demonstrations, two to each other part.
_BRAND_PART = ("demonstrations",) * 4 + ("practice",) * 2 + ("validation",) * 2 + ("test",) * 2


@dataclass(frozen=True)
class Truth:
    """What the policy says of an ad: `rule` 0 is compliant, and then `sentence` and `topic` are empty."""

    rule: int
    sentence: str
    product: str
    topic: str


def brands(part: str) -> list[str]:
    """All brand names of one part, in a fixed order."""
    first, middle, last = BRAND_SYLLABLES
    names = (a + b + c for a in first for b in middle for c in last)
    return [name for name in names if _BRAND_PART[zlib.crc32(name.encode()) % 10] == part]


def split_sentences(ad: str) -> list[str]:
    """The sentences of an ad; every sentence ends in a full stop and has no other."""
    return [sentence + "." for sentence in ad.removesuffix(".").split(". ")]


def broken_rules(text: str) -> list[int]:
    """Numbers of all rules that have a cue in the text."""
    lowered = text.lower()
    return [number for number, cue in CUES.items() if cue.search(lowered)]


def find_topic(rule: Rule, sentence: str) -> str:
    """The longest of the rule's topics that the sentence names, or an empty string."""
    if rule.number == 2:
        found = _SUM.search(sentence)
        return found.group() if found else ""
    topics = [topic for part in PARTS for topic in rule.topics[part] if topic in sentence]
    return max(topics, key=len, default="")


def moderate(prompt: str) -> Truth:
    """Applies the policy to the text of a prompt.

    Raises ValueError for a text without a known product or with more than one offending sentence: not of this task.
    """
    ad = prompt.removeprefix(PROMPT_PREFIX)
    product = _PRODUCT.search(ad)
    if product is None:
        raise ValueError(f"prompt: expected an ad that names a product, got {prompt!r}")
    broken = [(rule, sentence) for sentence in split_sentences(ad) for rule in broken_rules(sentence)]
    if not broken:
        return Truth(0, "", product.group(), "")
    if len(broken) > 1:
        raise ValueError(f"prompt: expected at most one violation, got {broken}")
    rule, sentence = broken[0]
    return Truth(rule, sentence, product.group(), find_topic(RULE_BY_NUMBER[rule], sentence))


def reference_answer(prompt: str, truth: Truth) -> str:
    """A full-marks answer. Which of the rule's rewrites it uses hangs on a checksum of the prompt: any would do."""
    if truth.rule == 0:
        return APPROVE
    rule = RULE_BY_NUMBER[truth.rule]
    pattern = rule.rewrites[zlib.crc32(prompt.encode()) % len(rule.rewrites)]
    rewrite = pattern.format(p=truth.product, t=truth.topic)
    return f'Rule {rule.number}: {rule.name}.\nQuote: "{truth.sentence}"\nRewrite: {rewrite}'


def _pick(rng: random.Random, table: dict[str, tuple[str, ...]], parts: tuple[str, ...]) -> str:
    return rng.choice([entry for part in parts for entry in table[part]])


def _topic(rng: random.Random, rule: Rule, parts: tuple[str, ...]) -> str:
    """A topic of the rule; sums of money are told apart by their leading digit, so that no sum is in two parts."""
    topic = _pick(rng, rule.topics, parts)
    if rule.number != 2:
        return topic
    tail = f"{rng.randrange(100):02d}0" if rng.random() < 0.5 else f"{rng.randrange(10)}0"
    return f"${topic},{tail} a {rng.choice(_PERIODS)}" if len(tail) == 3 else f"${topic}{tail} a {rng.choice(_PERIODS)}"


def make_ad(rng: random.Random, parts: tuple[str, ...], names: list[str]) -> dict:
    """One row: prompt, reference response and the truth columns, from the patterns and values of `parts`."""
    product = f"{rng.choice(names)} {rng.choice(KINDS)}"
    sentences = [_pick(rng, OPENERS, parts).format(p=product)]
    if rng.random() < 0.5:
        decoy = rng.choice(RULES)
        sentences.append(_pick(rng, decoy.decoys, parts).format(t=_topic(rng, decoy, parts)))
    else:
        sentences.append(_pick(rng, FILLERS, parts))
    truth = Truth(0, "", product, "")
    if rng.random() >= COMPLIANT_SHARE:
        rule = rng.choice(RULES)
        topic = _topic(rng, rule, parts)
        sentence = _pick(rng, rule.offending, parts).format(p=product, t=topic)
        truth = Truth(rule.number, sentence, product, topic)
        sentences.append(sentence)
    else:
        sentences.append(_pick(rng, FILLERS, parts))
    rng.shuffle(sentences)
    prompt = PROMPT_PREFIX + " ".join(sentences)
    return {"prompt": prompt, "response": reference_answer(prompt, truth), "source": "ads", **asdict(truth)}


def generate(parts: tuple[str, ...], seed: int, stream: str) -> Iterator[dict]:
    """Endless distinct ads from the named parts; `stream` separates uses of one part under one seed."""
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        raise ValueError(f"parts: expected some of {PARTS}, got {parts}")
    rng = random.Random(f"{seed}/{stream}")
    names = [name for part in parts for name in brands(part)]
    seen = set()
    while True:
        row = make_ad(rng, parts, names)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row
