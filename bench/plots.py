"""Time and peak memory against sizes, a line per provider, from the rows of a bench."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

PANELS = (("median", 1.0, "time, ms"), ("peak_bytes", 2.0**20, "peak memory of a call, MiB"))


def sizes(rows: list[dict], letter: str, label: str) -> dict[str, dict[str, int]]:
    """Return one axis of `curves`: the cases that differ only by the number after `letter`, as in "A2048 V32000"."""
    matches = {row["case"]: re.search(rf"\b{letter}(\d+)\b", row["case"]) for row in rows}
    families = {case: case.replace(match[0], letter) for case, match in matches.items() if match}
    if not families:
        return {}
    largest_family, _ = Counter(families.values()).most_common(1)[0]
    fixed = " ".join(re.findall(r"\b[A-Z]\d+\b", largest_family))
    return {
        f"{label} ({fixed})" if fixed else label: {
            c: int(matches[c][1]) for c, family in families.items() if family == largest_family
        }
    }


def curves(rows: list[dict], axes: dict[str, dict[str, int]], path: Path) -> None:
    """Write a plot beside `path`, with the suffix .png: a column per axis, time above memory. Needs matplotlib.

    axes: label -> {case: its position on the axis}. An axis with fewer than two positions is left out.
    """
    axes = {label: positions for label, positions in axes.items() if len(set(positions.values())) > 1}
    if not axes:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if any(row[panel[0]] for row in rows)]
    shape = (len(panels), len(axes))
    figure, grid = pyplot.subplots(*shape, figsize=(5.5 * shape[1] + 2.5, 4 * shape[0]), squeeze=False)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    for (key, unit, name), line in zip(panels, grid, strict=True):
        for (label, positions), panel in zip(axes.items(), line, strict=True):
            _lines(panel, rows, providers, positions, key, unit)
            panel.set(xlabel=label, ylabel=name, xscale="log", yscale="log")
            panel.grid(alpha=0.3)
            ticks = sorted(set(positions.values()))
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            panel.minorticks_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False)
    figure.suptitle(f"{rows[0]['bench']} on {rows[0]['device']}")
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / figure.get_figwidth(), 1))
    figure.savefig(path.with_suffix(".png"), dpi=100)
    pyplot.close(figure)
    print(f"wrote {path.with_suffix('.png')}")


def _lines(panel, rows, providers, positions, key, unit) -> None:
    points = defaultdict(list)
    for row in rows:
        if row[key] and row["case"] in positions:
            points[row["provider"]].append((positions[row["case"]], row[key] / unit))
    for number, provider in enumerate(providers):
        xs, ys = zip(*sorted(points[provider]), strict=True) if points[provider] else ((), ())
        panel.plot(xs, ys, marker="o", color=f"C{number}", label=provider)
