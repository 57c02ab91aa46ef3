"""Charts of rows as inline SVG: a dot at the median, a whisker from the 20th to the 80th percentile.

A case is a line of the chart and a provider a colour. Colours come from the page's style, as in the charts of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

COLORS = 7
WIDTH, RIGHT, TOP, BOTTOM = 860, 28, 6, 40
CHARACTER, STEP, GAP = 6.1, 8, 10
LOG_ABOVE = 5.0  # a logarithmic axis if the largest value is more than this many times the smallest


@dataclass(frozen=True)
class Dot:
    """A row of a chart.

    Attributes:
        color: number of its colour and mark.
        low, median, high: 20th percentile, median and 80th percentile.
        title: shown under the pointer.
    """

    color: int
    low: float
    median: float
    high: float
    title: str


def whisker_chart(
    title: str, axis: str, lines: Mapping[str, Sequence[Dot]], floors: Mapping[str, float] | None = None
) -> Markup:
    """Return a chart.

    Args:
        title: for readers who hear the page.
        axis: label of the axis, with its unit.
        lines: dots of each line, by the line's label. All values are above 0.
        floors: by line, a bound that is drawn as a bar.
    """
    floors = floors or {}
    values = [v for dots in lines.values() for dot in dots for v in (dot.low, dot.median, dot.high)] + [
        *floors.values()
    ]
    is_log = max(values) > LOG_ABOVE * min(values)
    ticks = _log_ticks(min(values), max(values)) if is_log else _linear_ticks(max(values))
    low, high = (min(ticks[0], *values), max(ticks[-1], *values)) if is_log else (0.0, max(ticks[-1], *values))
    left = 12 + CHARACTER * max(map(len, lines))
    height = TOP + BOTTOM + sum(STEP * len(dots) + GAP for dots in lines.values())

    def x_of(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else value / high
        return left + share * (WIDTH - RIGHT - left)

    parts = [Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(WIDTH, height, title)]
    for tick in ticks:
        parts.append(_line("grid", x_of(tick), x_of(tick), TOP, height - BOTTOM))
        parts.append(_text(x_of(tick), height - BOTTOM + 14, "middle", f"{tick:,.6g}"))
    words = f"{axis}, logarithmic" if is_log else axis
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 8, "middle", words))
    y = TOP + GAP / 2
    for label, dots in lines.items():
        size = STEP * len(dots)
        parts.append(_text(left - 8, y + size / 2 + 3.5, "end", label))
        parts.append(_line("grid", left, WIDTH - RIGHT, y + size + GAP / 2, y + size + GAP / 2))
        if label in floors:
            parts.append(_line("target", x_of(floors[label]), x_of(floors[label]), y, y + size))
        for number, dot in enumerate(dots):
            middle = y + STEP * (number + 0.5)
            parts.append(_line(f"s{dot.color % COLORS}", x_of(dot.low), x_of(dot.high), middle, middle))
            parts.append(mark(dot.color, x_of(dot.median), middle, dot.title))
        y += size + GAP
    return Markup("").join([*parts, Markup("</svg>")])


def mark(color: int, x: float, y: float, title: str = "") -> Markup:
    """Return the mark of a provider: a circle, a square or a diamond of its colour."""
    shape = (color + color // COLORS) % 3
    if shape == 0:
        body = Markup('<circle class="m{}" cx="{:.1f}" cy="{:.1f}" r="3.2">').format(color % COLORS, x, y)
        end = Markup("</circle>")
    else:
        turn = Markup(' transform="rotate(45 {:.1f} {:.1f})"').format(x, y) if shape == 2 else Markup("")
        body = Markup('<rect class="m{}" x="{:.1f}" y="{:.1f}" width="5.6" height="5.6"{}>').format(
            color % COLORS, x - 2.8, y - 2.8, turn
        )
        end = Markup("</rect>")
    return body + (Markup("<title>{}</title>").format(title) if title else Markup("")) + end


def key(color: int) -> Markup:
    """Return the sample of a provider in the legend."""
    return Markup('<svg class="key" viewBox="0 0 22 12" aria-hidden="true">{}{}</svg>').format(
        _line(f"s{color % COLORS}", 1, 21, 6, 6), mark(color, 11, 6)
    )


def _line(name: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(name, x1, x2, y1, y2)


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten around a range, with 2 and 5 times them if it spans less than three of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first < 3 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    below = max((t for t in ticks if t <= low), default=ticks[0])
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    return [t for t in ticks if below <= t <= above]


def _linear_ticks(high: float) -> list[float]:
    """Return about five multiples of 1, 2 or 5 times a power of ten, from 0 to just above a value."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= high / 5)
    return [step * i for i in range(math.ceil(high / step) + 1)]
