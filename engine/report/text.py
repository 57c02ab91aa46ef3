"""Numbers and model text as a report prints them: sensible digits, units, nothing hidden."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

__all__ = ["NOT_MEASURED", "arrow", "breakdown", "interval", "number", "percent", "signed", "visible"]

NOT_MEASURED = "not measured"
MINUS = "\N{MINUS SIGN}"
LONGEST_TEXT = 20_000
_NAMES = {"\0": "NUL", "\a": "BEL", "\b": "BS", "\t": "TAB", "\r": "CR", "\x1b": "ESC", "\x7f": "DEL"}
_JOINERS = "\u200c\u200d"  # part of ordinary words and emoji


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals when it is small, fewer and grouped by thousands when it is large."""
    if value is None:
        return NOT_MEASURED
    size = abs(value)
    if size >= 1e6:
        text = f"{value:.3g}" if size >= 1e15 else f"{value:,.0f}"
    else:
        decimals = (
            digits if size < 10 else max(0, digits - 1) if size < 100 else max(0, digits - 2) if size < 1000 else 0
        )
        text = f"{value:,.{decimals}f}"
        if 0 < size < 0.5 * 10.0**-decimals:
            text = f"{value:.1e}"
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A change: always with its sign."""
    text = number(value, digits)
    return text if value is None or value < 0 else f"+{text}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as a percentage."""
    return NOT_MEASURED if value is None else f"{100 * value:.{decimals}f}%".replace("-", MINUS)


def interval(ci95: Sequence[float] | None) -> str:
    """A confidence interval in words, or an empty text."""
    return "" if ci95 is None else f"95% CI {signed(ci95[0])} to {signed(ci95[1])}"


def arrow(before: float | None, after: float | None, show: Any = number) -> str:
    """`before -> after`; one that is missing is a dash, and both missing is "not measured"."""
    if before is None and after is None:
        return NOT_MEASURED
    left, right = ("\N{EN DASH}" if v is None else show(v) for v in (before, after))
    return f"{left} \N{RIGHTWARDS ARROW} {right}"


def visible(text: Any) -> Markup:
    """Model text as HTML: escaped, line ends kept, every other character that does not show made to show.

    Control characters, formatting characters (such as those that turn the direction of writing), lone surrogates
    and code points without a character appear as marks: a name such as ESC, or the code point.
    """
    text = "" if text is None else str(text)
    left_out = len(text) - LONGEST_TEXT
    parts, plain = [], []
    for character in text[:LONGEST_TEXT]:
        mark = _mark(character)
        if mark is None:
            plain.append(character)
            continue
        parts += [escape("".join(plain)), Markup('<span class="ctl">{}</span>').format(mark)]
        plain = []
    parts.append(escape("".join(plain)))
    if left_out > 0:
        parts.append(Markup('<span class="ctl">{}</span>').format(f" ({left_out:,} more characters left out)"))
    return Markup("").join(parts)


def breakdown(before: Any, after: Any) -> list[tuple[str, str, str]]:
    """Scores before and after as rows (part, before, after); each a number or a (nested) mapping of parts."""
    left, right = dict(_parts(before)), dict(_parts(after))
    return [(name, _value(left.get(name)), _value(right.get(name))) for name in {**left, **right}]


def _parts(score: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(score, Mapping):
        return [(prefix or "score", score)]
    return [
        part for name, value in score.items() for part in _parts(value, f"{prefix}.{name}" if prefix else str(name))
    ]


def _value(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value) if math.isfinite(value) else str(value)
    return visible(value)


def _mark(character: str) -> str | None:
    code = ord(character)
    if character == "\n" or character in _JOINERS:
        return None
    if character in _NAMES:
        return _NAMES[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"U+{code:04X}"
    return None
