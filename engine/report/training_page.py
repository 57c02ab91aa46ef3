"""The report of SFT, reward models and value pretraining: `curves.png` and `report.html`, from the metrics alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.config import CONFIG_FILE
from icegrt.report.plots import Panel, Series, legend, panel_svg, series_of, with_data, write_curves_png
from icegrt.report.profile import profile_files
from icegrt.report.tables import render_page, settings_tables
from icegrt.report.text import number, percent
from icegrt.utils.files import json_safe, write_text_atomic

TITLES = {"sft": "SFT run", "reward": "Reward-model run", "value": "Value-pretraining run"}
_UNITS = {
    "sft": "nats per response token",
    "reward": "nats per pair",
    "value": "half the squared error",
}
_FIGURES = {
    "loss": ("training loss", number),
    "heldout_loss": ("held-out loss", number),
    "accuracy": ("training accuracy", percent),
    "heldout_accuracy": ("held-out accuracy", percent),
    "explained_variance": ("training explained variance", number),
    "heldout_explained_variance": ("held-out explained variance", number),
    "grad_norm": ("gradient norm", number),
    "lr": ("learning rate", lambda value: "not measured" if value is None else f"{value:.3g}"),
    "tokens_per_second": ("tokens per second", number),
}


def write_training_report(run_dir: Path, kind: str, rows: Sequence[Mapping[str, Any]], title: str = "") -> Path:
    """Write curves.png and report.html into `run_dir`; return the path of the page.

    Args:
        run_dir: the run's folder.
        kind: "sft", "reward" or "value".
        rows: metrics of that kind, at least one.
        title: the page's title.
    """
    title = title or f"{TITLES[kind]} {run_dir.name}"
    panels = training_panels(kind, rows)
    if panels:
        write_curves_png(run_dir / "curves.png", panels, title, "step")
    page = render_page(
        "training_report.html",
        title=title,
        charts=[{"title": p.title, "unit": p.unit, "svg": panel_svg(p, "step"), "legend": legend(p)} for p in panels],
        figures=_first_and_last(rows),
        profiles=profile_files(run_dir),
        settings=settings_tables(run_dir / CONFIG_FILE, None),
    )
    write_text_atomic(run_dir / "report.html", page)
    return run_dir / "report.html"


def training_panels(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return the charts of such a run; a chart without a number is dropped."""

    def trained(key: str, label: str = "training data") -> Series:
        return series_of(label, rows, key, x_key="step")

    def heldout(key: str) -> Series:
        return series_of("held-out data", [row for row in rows if row.get(key) is not None], key, True, x_key="step")

    return with_data(
        [
            Panel("Loss", _UNITS[kind], (trained("loss"), heldout("heldout_loss"))),
            Panel("Accuracy", "of untied pairs", (trained("accuracy"), heldout("heldout_accuracy")), percent=True),
            Panel(
                "Explained variance",
                "of the returns; 1: all",
                (trained("explained_variance"), heldout("heldout_explained_variance")),
            ),
            Panel("Gradient norm", "before clipping", (trained("grad_norm"),)),
            Panel("Learning rate", "per step", (trained("lr"),)),
            Panel("Speed", "tokens per second", (trained("tokens_per_second"),)),
        ]
    )


def _first_and_last(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the first and the last value of each figure that the rows have, as (label, first, last)."""
    table = []
    for key, (label, show) in _FIGURES.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            first, last = json_safe([values[0], values[-1]], not_finite_as_null=True)
            table.append((label, show(first), show(last)))
    return table
