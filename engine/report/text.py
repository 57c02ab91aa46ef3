"""Format numbers and model text for a report: significant digits, units, visible characters."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from icegrt.utils.values import flatten

__all__ = ["NOT_MEASURED", "arrow", "breakdown", "interval", "number", "percent", "signed", "visible"]

NOT_MEASURED = "not measured"
MINUS = "\N{MINUS SIGN}"
MAX_TEXT_LENGTH = 20_000
_NAMES = {"\0": "NUL", "\a": "BEL", "\b": "BS", "\t": "TAB", "\r": "CR", "\x1b": "ESC", "\x7f": "DEL"}
_JOINERS = "\u200c\u200d"  # ordinary words and emoji contain them


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` decimals if it is small, with fewer and grouped by thousands if it is large."""
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
    """Return a change with its sign."""
    text = number(value, digits)
    return text if value is None or value < 0 else f"+{text}"


def percent(value: float | None, decimals: int = 1) -> str:
    """Return a fraction as a percentage."""
    return NOT_MEASURED if value is None else f"{100 * value:.{decimals}f}%".replace("-", MINUS)


def interval(ci95: Sequence[float] | None) -> str:
    """Return a confidence interval in words; empty for None."""
    return "" if ci95 is None else f"95% CI {signed(ci95[0])} to {signed(ci95[1])}"


def arrow(before: float | None, after: float | None, show: Any = number) -> str:
    """Return `before -> after`, with a dash for a missing value, or "not measured" if both are missing."""
    if before is None and after is None:
        return NOT_MEASURED
    left, right = ("\N{EN DASH}" if v is None else show(v) for v in (before, after))
    return f"{left} \N{RIGHTWARDS ARROW} {right}"


def visible(text: Any) -> Markup:
    """Return model text as HTML: escaped, with line ends, and with marks for invisible characters.

    Marked are control characters, formatting characters (such as those that change the direction of writing), lone
    surrogates and unassigned code points. A mark is a name such as ESC, or the code point.
    """
    text = "" if text is None else str(text)
    n_omitted = len(text) - MAX_TEXT_LENGTH
    parts, unmarked = [], []
    for character in text[:MAX_TEXT_LENGTH]:
        mark = _mark(character)
        if mark is None:
            unmarked.append(character)
            continue
        parts += [escape("".join(unmarked)), Markup('<span class="ctl">{}</span>').format(mark)]
        unmarked = []
    parts.append(escape("".join(unmarked)))
    if n_omitted > 0:
        parts.append(Markup('<span class="ctl">{}</span>').format(f" ({n_omitted:,} more characters omitted)"))
    return Markup("").join(parts)


def breakdown(before: Any, after: Any) -> list[tuple[str, str, str]]:
    """Return scores as rows (part, before, after). A score is a number or a nested mapping of parts."""
    before_parts, after_parts = (_parts(score) for score in (before, after))
    return [
        (name, _value(before_parts.get(name)), _value(after_parts.get(name)))
        for name in {**before_parts, **after_parts}
    ]


def _parts(score: Any) -> dict[str, Any]:
    return dict(flatten(score)) if isinstance(score, Mapping) else {"score": score}


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
