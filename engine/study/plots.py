"""The picture of one measure: curves with bands over seeds, the value of every run, and the contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icegrt.report.plots import COLORS
from icegrt.study.results import ContrastResult, Curve, Results

__all__ = ["band_of", "write_picture"]

_LINES = ("-", "--", ":", "-.")


def band_of(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return x, mean, smallest and largest value over seeds, at each x that all curves have."""
    by_x = [dict(curve) for curve in curves]
    xs = sorted(set.intersection(*map(set, by_x))) if by_x else []
    rows = [[curve[x] for curve in by_x] for x in xs]
    return xs, [sum(row) / len(row) for row in rows], [min(row) for row in rows], [max(row) for row in rows]


def write_picture(path: Path, results: Results, measure: str, unit: str = "") -> None:
    """Draw a measure into a PNG by matplotlib, without a display.

    Left: the mean of each setting, in a band from the smallest to the largest seed; only of a measure with rows.
    Middle: the value of every run, with the mean of the setting. Right: contrasts with their 95% intervals.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = results.curves.get(measure) or {}
    settings = list(results.values[measure])
    contrasts = [c for c in results.contrasts if c.measure == measure and c.difference is not None]
    widths = [*([1.4] if curves else []), 1.0, *([1.1] if contrasts else [])]
    height = 3.6 + 0.22 * max(0, len(settings) - 5)
    figure = Figure(figsize=(4.6 * sum(widths), height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})[0])
    label = f"{measure} ({unit})" if unit else measure
    if curves:
        _draw_curves(axes.pop(0), curves, settings, label)
    _draw_values(axes.pop(0), results, measure, label)
    if contrasts:
        _draw_contrasts(axes.pop(0), contrasts, label)
    figure.savefig(path, format="png")


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curves(axes: Any, curves: dict[str, list[Curve]], settings: list[str], label: str) -> None:
    for number, setting in enumerate(settings):
        if setting not in curves:
            continue
        color, line = COLORS[number % len(COLORS)], _LINES[number // len(COLORS) % len(_LINES)]
        x, mean, low, high = band_of(curves[setting])
        marker = "o" if len(x) == 1 else None
        axes.plot(x, mean, line, color=color, marker=marker, label=f"{setting} ({len(curves[setting])} seeds)")
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("iteration", fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    _style(axes, "mean and range over seeds")


def _draw_values(axes: Any, results: Results, measure: str, label: str) -> None:
    settings = list(results.values[measure])
    for number, setting in enumerate(settings):
        values = list(results.values[measure][setting].values())
        if not values:
            continue
        color = COLORS[number % len(COLORS)]
        axes.plot(values, [number] * len(values), "o", color=color, markersize=5, alpha=0.6)
        axes.plot([sum(values) / len(values)], [number], "|", color=color, markersize=18, markeredgewidth=2)
    axes.set_yticks(range(len(settings)), settings, fontsize=8)
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlabel(label, fontsize=8)
    _style(axes, "every run")


def _draw_contrasts(axes: Any, contrasts: Sequence[ContrastResult], label: str) -> None:
    for number, result in enumerate(contrasts):
        difference = result.difference
        error = [[difference.mean - difference.low], [difference.high - difference.mean]]
        axes.errorbar([difference.mean], [number], xerr=error, fmt="o", color="0.2", capsize=3, markersize=5)
        margin = result.contrast.margin
        if margin > 0:
            axes.plot([-margin, margin], [number, number], color=COLORS[4], linewidth=8, alpha=0.3, zorder=0)
    axes.axvline(0, color="0.4", linestyle=(0, (4, 3)), linewidth=1)
    names = [f"{c.contrast.name}\n{c.contrast.a} \N{MINUS SIGN} {c.contrast.b}" for c in contrasts]
    axes.set_yticks(range(len(contrasts)), names, fontsize=8)
    axes.set_ylim(len(contrasts) - 0.5, -0.5)
    axes.set_xlabel(f"difference in {label}", fontsize=8)
    _style(axes, "differences, 95% CI")
