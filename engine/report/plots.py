"""The curves of a run: `Panel` describes a chart, which is drawn as inline SVG for the page and into `curves.png`.

The SVG has no colours. Its classes `s0`, `s1`, ... get them from the page's style, so that one drawing serves light and
dark screens. Series differ in colour (the palette of Okabe and Ito), dash and marker.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

__all__ = [
    "COLORS",
    "Panel",
    "Series",
    "legend",
    "panel_svg",
    "ppo_panels",
    "series_of",
    "stacked_bar_svg",
    "with_data",
    "write_curves_png",
]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 200, 48, 10, 10, 30
MAX_POINTS = 600
_DASHES = ("", "6 3", "2 3")
_LEGEND_KEY = Markup('<svg class="key" viewBox="0 0 22 12" aria-hidden="true">{}{}</svg>')


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: x (iterations), y (NaN breaks the line), and if each point has a marker."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    markers: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart.

    target: a dashed horizontal line with its label. x_label: of this chart, if not that of the others. log2_x: x is
    log2 of what the ticks print.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    target: tuple[str, float] | None = None
    percent: bool = False
    x_label: str = ""
    log2_x: bool = False


def ppo_panels(rows: Sequence[dict[str, Any]], kl_target_nats_per_response: float | None = None) -> list[Panel]:
    """Return the charts of a PPO run from the rows of `read_metrics`; a chart without a number is dropped."""
    steps = [row for row in rows if row["kind"] == "ppo"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    evaluations += [step["evaluation"] for step in steps if step.get("evaluation")]
    evaluations.sort(key=lambda row: row["iteration"])

    def trained(key: str, label: str = "training prompts") -> Series:
        return series_of(label, steps, key)

    def heldout(key: str, label: str = "held-out prompts") -> Series:
        return series_of(label, evaluations, key, markers=True)

    target = None if kl_target_nats_per_response is None else ("target", kl_target_nats_per_response)
    panels = [
        Panel("Held-out score", "per response, fixed normalization", (heldout("score_mean"),)),
        Panel(
            "Score and reward that training pays",
            "per response, running normalization",
            (trained("score_mean", "score"), trained("reward_mean", "reward")),
        ),
        Panel(
            "Reward-model score",
            "raw, per response",
            (trained("reward_model_score_mean"), heldout("reward_model_score_mean")),
        ),
        Panel(
            "Task score",
            "first reward function, per response",
            (
                trained("function_score_mean"),
                heldout("function_score_mean"),
                heldout("greedy_function_score_mean", "held-out, greedy"),
            ),
        ),
        Panel(
            "KL from the reference",
            "nats per response",
            (trained("kl_nats_per_response"), heldout("kl_nats_per_response")),
            target,
        ),
        Panel("Entropy", "nats per token", (trained("entropy_nats_per_token"),)),
        Panel("Clip fraction", "of all tokens", (trained("clip_fraction"),), percent=True),
        Panel("Tokens capped or masked", "of all tokens", (trained("correction_fraction"),), percent=True),
        Panel("Value explained variance", "1 is perfect", (trained("value_explained_variance"),)),
        Panel("Response length", "tokens", (trained("response_tokens_mean"), heldout("response_tokens_mean"))),
        Panel(
            "Truncated answers",
            "of all answers",
            (trained("truncated_fraction"), heldout("truncated_fraction")),
            percent=True,
        ),
    ]
    return with_data(panels)


def with_data(panels: Sequence[Panel]) -> list[Panel]:
    """Return the panels without series that have no finite number, and without panels that have no series then."""
    panels_with_data = []
    for panel in panels:
        series = tuple(s for s in panel.series if any(math.isfinite(y) for y in s.y))
        if series:
            panels_with_data.append(dataclasses.replace(panel, series=series))
    return panels_with_data


def panel_svg(panel: Panel, x_label: str = "iteration") -> Markup:
    """Return a chart as inline SVG, without title and legend, which the page prints."""
    # 1. ranges and scale
    x_low, x_high, y_low, y_high = _ranges(panel)
    y_ticks = _ticks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        x_fraction, y_fraction = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + x_fraction * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y_fraction * (HEIGHT - TOP - BOTTOM)

    # 2. grid and ticks
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, panel.title)]
    for tick in y_ticks:
        _, y = to_pixels(x_low, tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        )
        text = f"{100 * tick:.4g}%" if panel.percent else _tick_text(tick, y_ticks)
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 6, y + 3.5, text)
        )
    for tick in _ticks(x_low, x_high, 6):
        if tick != int(tick) or not x_low <= tick <= x_high:
            continue
        x, _ = to_pixels(tick, y_low)
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x, HEIGHT - 15, f"{2**tick if panel.log2_x else tick:.0f}"
            )
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            middle, HEIGHT - 2, panel.x_label or x_label
        )
    )
    # 3. the target and the curves
    if panel.target is not None:
        _, y = to_pixels(x_low, panel.target[1])
        line = '<line class="target" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        parts.append(Markup(line).format(LEFT, WIDTH - RIGHT, y, y))
    for number, series in enumerate(panel.series):
        parts += _curve(number, series, to_pixels, panel.percent)
    return Markup("").join([*parts, Markup("</svg>")])


def legend(panel: Panel) -> list[tuple[Markup, str]]:
    """Return a short sample and the label of each line of the panel."""
    keys = [(_legend_key(number, series), series.label) for number, series in enumerate(panel.series)]
    if panel.target is not None:
        line = Markup('<line class="target" x1="0" x2="22" y1="6" y2="6"/>')
        keys.append((_LEGEND_KEY.format(line, ""), f"{panel.target[0]} {panel.target[1]:g}"))
    return keys


def _legend_key(number: int, series: Series) -> Markup:
    color, dash = number % len(COLORS), _DASHES[number % len(_DASHES)]
    line = Markup('<polyline class="s{}" stroke-dasharray="{}" points="0,6 22,6"/>').format(color, dash)
    mark = _mark(number, 11, 6) if series.markers else Markup("")
    return _LEGEND_KEY.format(line, mark)


def stacked_bar_svg(values: Sequence[tuple[str, float]]) -> Markup:
    """Return a horizontal bar whose segments are proportional to (name, value); a segment's title has both."""
    total = sum(value for _, value in values) or 1.0
    frame = 'viewBox="0 0 1000 26" preserveAspectRatio="none" role="img" aria-label="time per phase"'
    parts, x = [Markup(f'<svg class="bar" {frame}>')], 0.0
    for number, (name, value) in enumerate(values):
        width = 1000 * value / total
        parts.append(
            Markup('<rect class="f{}" x="{:.2f}" y="0" width="{:.2f}" height="26"><title>{}</title></rect>').format(
                number % len(COLORS), x, max(0.0, width - 1.5), f"{name}: {value / total:.1%}"
            )
        )
        x += width
    return Markup("").join([*parts, Markup("</svg>")])


def write_curves_png(path: str | Path, panels: Sequence[Panel], title: str = "", x_label: str = "iteration") -> None:
    """Draw all charts into one PNG, three in a row, by matplotlib without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows = max(1, math.ceil(len(panels) / 3))
    height = 2.9 * rows + 0.5  # inches
    figure = Figure(figsize=(12, height), dpi=110)
    # Margins and places of titles are fixed: matplotlib would measure all texts to find them, for half of the time.
    figure.subplots_adjust(left=0.065, right=0.99, bottom=0.5 / height, top=1 - 0.8 / height, wspace=0.27, hspace=0.42)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(_literal(title), fontsize=13)
    grid = figure.subplots(rows, 3, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        # 1. curves and target
        for number, series in enumerate(panel.series):
            style = ("-", "--", ":")[number % 3]
            marker = ("o", "s", "D")[number % 3] if series.markers or len(series.x) == 1 else None
            color = COLORS[number % len(COLORS)]
            axes.plot(series.x, series.y, style, color=color, marker=marker, markersize=4, label=_literal(series.label))
        if panel.target is not None:
            axes.axhline(
                panel.target[1],
                color="0.4",
                linestyle=(0, (4, 3)),
                linewidth=1,
                label=f"{panel.target[0]} {panel.target[1]:g}",
            )
        # 2. titles, axes and legend
        axes.set_title(_literal(panel.title), fontsize=10, y=1.0)
        axes.set_ylabel(_literal(panel.unit), fontsize=8)
        axes.set_xlabel(panel.x_label or x_label, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.percent:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if axes.get_ylim()[1] > 0.03 else 1))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.series) > 1 or panel.target is not None:
            axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, format="png")


def series_of(
    label: str, rows: Sequence[Mapping[str, Any]], key: str, markers: bool = False, x_key: str = "iteration"
) -> Series:
    """Return the values of `key` in the rows as a line; long ones as means of at most MAX_POINTS bins."""
    x = [float(row[x_key]) for row in rows]
    y = [math.nan if row.get(key) is None else float(row[key]) for row in rows]
    if len(x) > MAX_POINTS:
        size = math.ceil(len(x) / MAX_POINTS)
        bins = [slice(start, start + size) for start in range(0, len(x), size)]
        x, y = [_mean(x[b]) for b in bins], [_mean(y[b]) for b in bins]
        label = f"{label} (means of {size})"
    return Series(label, x, y, markers)


def _curve(number: int, series: Series, to_pixels: Any, percent: bool) -> list[Markup]:
    segments: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(y):
            segments[-1].append((x, y))
        elif not series.markers:
            segments.append([])
    color, dash = number % len(COLORS), _DASHES[number % len(_DASHES)]
    parts = []
    for segment in segments:
        if len(segment) > 1:
            points = " ".join("{:.1f},{:.1f}".format(*to_pixels(x, y)) for x, y in segment)
            parts.append(
                Markup('<polyline class="s{}" stroke-dasharray="{}" points="{}"/>').format(color, dash, points)
            )
        for x, y in segment if series.markers or len(segment) == 1 else []:
            label = f"{series.label}, iteration {x:g}: {f'{y:.1%}' if percent else f'{y:.4g}'}"
            parts.append(_mark(number, *to_pixels(x, y), label))
    return parts


def _mark(number: int, x: float, y: float, label: str = "") -> Markup:
    color, title = number % len(COLORS), Markup("<title>{}</title>").format(label) if label else Markup("")
    if number % 2:
        return Markup('<circle class="m{}" cx="{:.1f}" cy="{:.1f}" r="3">{}</circle>').format(color, x, y, title)
    return Markup('<rect class="m{}" x="{:.1f}" y="{:.1f}" width="5.6" height="5.6">{}</rect>').format(
        color, x - 2.8, y - 2.8, title
    )


def _ranges(panel: Panel) -> tuple[float, float, float, float]:
    xs = [x for s in panel.series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
    ys = [y for s in panel.series for y in s.y if math.isfinite(y)]
    if panel.target is not None:
        ys.append(panel.target[1])
    if panel.percent:
        ys.append(0.0)
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    if y_high - y_low <= 1e-9 * max(1.0, abs(y_high)):
        pad = 0.01 if panel.percent else max(abs(y_high) * 0.1, 1e-3)
        y_low, y_high = (y_low if panel.percent else y_low - pad), y_high + pad
    return x_low, x_high, y_low, y_high


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return `about` multiples of 1, 2 or 5 times a power of ten, from just below `low` to just above `high`."""
    min_step = (high - low) / about
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= min_step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    if abs(ticks[-1]) >= 1e5 or step < 1e-4:
        return f"{tick:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _literal(text: str) -> str:
    """Return text that matplotlib draws unchanged: without mathematics and unprintable characters."""
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
