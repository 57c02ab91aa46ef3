"""Generate ads from a seed, and compute the truth about an ad from its text.

No ad is annotated. `moderate` finds the broken rule, the offending sentence, the product and the topic with the
policy's cue patterns; `reference_answer` follows from them. The generator writes the same facts into each row, and a
test compares the two on thousands of ads.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ad_moderation.phrases import (
    BRANDS,
    KINDS,
    LEADS,
    OBJECTS,
    OPENERS,
    PARTS,
    RULES,
    SUBJECTS,
    TAILS,
    TIMES,
    VERBS,
    Rule,
    part_of,
)

APPROVE = "Approve."
PROMPT_PREFIX = "Ad: "
COMPLIANT_FRACTION = 0.2
CUES = {rule.number: re.compile(rf"(?<![a-z])(?:{rule.cues})(?![a-z])") for rule in RULES}
RULE_BY_NUMBER = {rule.number: rule for rule in RULES}

_PRODUCT = re.compile(rf"\b(?:{'|'.join(BRANDS)}) (?:{'|'.join(KINDS)})\b")


@dataclass(frozen=True)
class Truth:
    """The facts of an ad under the policy. `rule` 0: compliant, with empty `sentence` and `topic`."""

    rule: int
    sentence: str
    product: str
    topic: str


def split_sentences(ad: str) -> list[str]:
    """Return the sentences of an ad. A sentence has one full stop, at its end."""
    return [sentence + "." for sentence in ad.removesuffix(".").split(". ")]


def broken_rules(text: str) -> list[int]:
    """Return the numbers of all rules that have a cue in the text."""
    lowered = text.lower()
    return [number for number, cue in CUES.items() if cue.search(lowered)]


def topics(rule: Rule) -> list[str]:
    """Return all topics of a rule: a modifier and a kind. Sums of money have no space between them."""
    space = "" if rule.number == 2 else " "
    return [f"{modifier}{space}{kind}" for modifier in rule.modifiers for kind in rule.kinds]


def find_topic(rule: Rule, sentence: str) -> str:
    """Return the longest of the rule's topics that the sentence names, or an empty string."""
    return max((topic for topic in topics(rule) if topic in sentence), key=len, default="")


def moderate(prompt: str) -> Truth:
    """Apply the policy to the text of a prompt.

    Raises:
        ValueError: the text names no known product, or has more than one offending sentence.
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
    """Return an answer with the full score. A checksum of the prompt chooses among the rule's equally good rewrites."""
    if truth.rule == 0:
        return APPROVE
    rule = RULE_BY_NUMBER[truth.rule]
    pattern = rule.rewrites[zlib.crc32(prompt.encode()) % len(rule.rewrites)]
    rewrite = pattern.format(p=truth.product, t=truth.topic)
    return f'Rule {rule.number}: {rule.name}.\nQuote: "{truth.sentence}"\nRewrite: {rewrite}'


def _combine(rng: random.Random, parts: tuple[str, ...], *tables: tuple[str, ...]) -> tuple[str, ...]:
    """Return a random entry of each table, such that the combination belongs to one of `parts`."""
    while True:
        combination = tuple(rng.choice(table) for table in tables)
        if part_of(*combination) in parts:
            return combination


def _topic(rng: random.Random, rule: Rule, parts: tuple[str, ...]) -> str:
    return ("" if rule.number == 2 else " ").join(_combine(rng, parts, rule.modifiers, rule.kinds))


def _filler(rng: random.Random, parts: tuple[str, ...]) -> str:
    return " ".join(_combine(rng, parts, SUBJECTS, VERBS, OBJECTS, TIMES)) + "."


def _offence(rng: random.Random, rule: Rule, parts: tuple[str, ...], product: str, topic: str) -> str:
    lead, claim, tail = _combine(rng, parts, LEADS, rule.claims, TAILS)
    return f"{lead} {claim.format(p=product, t=topic).removesuffix('.')} {tail}."


def make_ad(rng: random.Random, parts: tuple[str, ...]) -> dict:
    """Return one row, from the templates and values of `parts`: prompt, reference response and the truth columns."""
    product = " ".join(_combine(rng, parts, BRANDS, KINDS))
    decoy = rng.choice(RULES)
    second = rng.choice(decoy.decoys).format(t=_topic(rng, decoy, parts)) if rng.random() < 0.5 else _filler(rng, parts)
    truth = Truth(0, "", product, "")
    if rng.random() >= COMPLIANT_FRACTION:
        rule = rng.choice(RULES)
        topic = _topic(rng, rule, parts)
        sentence = _offence(rng, rule, parts, product, topic)
        truth = Truth(rule.number, sentence, product, topic)
        sentences = [second if product in sentence else rng.choice(OPENERS).format(p=product), sentence]
    else:
        sentences = [rng.choice(OPENERS).format(p=product), second]
    rng.shuffle(sentences)
    prompt = PROMPT_PREFIX + " ".join(sentences)
    return {"prompt": prompt, "response": reference_answer(prompt, truth), "source": "ads", **asdict(truth)}


def generate(parts: tuple[str, ...], seed: int, stream: str) -> Iterator[dict]:
    """Yield distinct ads of the parts without end. `stream` makes several independent sequences of one seed."""
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        raise ValueError(f"parts: expected some of {PARTS}, got {parts}")
    rng = random.Random(f"{seed}/{stream}")
    seen = set()
    while True:
        row = make_ad(rng, parts)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row
