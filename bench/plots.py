"""Time and peak memory against one size, a line per provider, from the rows of a bench."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path


def curves(rows: list[dict], sizes: dict[str, float], axis: str, path: Path) -> None:
    """Writes path (.png) with a panel for time and, where it was measured, one for memory.

    sizes: case -> its place on the axis. Does nothing where matplotlib is missing or fewer than two sizes were run.
    """
    rows = [row for row in rows if row["case"] in sizes]
    if len({sizes[row["case"]] for row in rows}) < 2:
        return
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("median", "ms")] + [("peak_bytes", "bytes")] * any(row["peak_bytes"] for row in rows)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for (key, unit), panel in zip(panels, axes[0], strict=True):
        lines = defaultdict(list)
        for row in rows:
            if row[key]:
                lines[row["provider"]].append((sizes[row["case"]], row[key]))
        for provider, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=provider)
        panel.set(xlabel=axis, ylabel=unit, xscale="log", yscale="log")
        panel.legend()
    figure.suptitle(f"{rows[0]['bench']} on {rows[0]['device']}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def target(device: str, milliseconds: float, what: str) -> None:
    """On a GPU, prints what ours must reach beside the figures above it."""
    if device == "cuda":
        print(f"{'':36s} {'ours must be':18s} {milliseconds:10.3f} ms  {what}")
