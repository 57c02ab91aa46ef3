"""Charts of value calibration on a run's page: bias and explained variance by token position and response length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.errors import CheckpointError
from icegrt.metrics import calibration_path
from icegrt.report.plots import Panel, Series, with_data
from icegrt.report.tables import charts
from icegrt.utils.files import read_object

LAST_ITERATIONS = 10
# Returns that differ by less than this share of their mean are equal numbers in fp32.
SPREAD_FLOOR = 1e-6
_X_LABELS = {"position": "position of the token in its response", "length": "tokens of the response"}


def calibration_charts(run_dir: Path, last_iterations: int = LAST_ITERATIONS) -> dict[str, Any] | None:
    """Return the charts over a run's last iterations; None without a recorded one.

    Iterations of value pretraining are left out, unless the run has no others: the critic learns otherwise in them.

    Returns:
        `iterations`, which ones as text, and `charts` as those of `tables.charts`.
    """
    paths = sorted(calibration_path(run_dir, 0).parent.glob("iteration_*.json"))[-last_iterations:]
    try:
        recorded = [read_object(path) for path in paths]
        documents = _like_the_last(recorded)
        tables = merged_tables(documents)
        first, last = (documents[i]["iteration"] for i in (0, -1)) if documents else (0, 0)
        panels = with_data([panel for by in _X_LABELS for panel in _panels(tables, by)])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
    if not panels:
        return None
    iterations = f"iteration {first}" if first == last else f"iterations {first} to {last}"
    if _is_pretraining(documents[-1]):
        iterations += " of value pretraining"
    elif len(documents) < len(recorded):
        iterations += " (those of value pretraining are left out)"
    return {"iterations": iterations, "charts": charts(panels)}


def _like_the_last(documents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the iterations that are of value pretraining, or not, as the last one."""
    return [d for d in documents if _is_pretraining(d) == _is_pretraining(documents[-1])]


def _is_pretraining(document: Mapping[str, Any]) -> bool:
    # Files of older runs do not record it.
    return bool(document.get("pretraining", False))


def merged_tables(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add up the sums of iterations, table by table; those at other lambdas than the last iteration's are left out."""
    merged: dict[tuple[float, str], dict[str, Any]] = {}
    for table in documents[-1]["tables"] if documents else []:
        key = (table["lambda"], table["by"])
        alike = [t for d in documents for t in d["tables"] if (t["lambda"], t["by"]) == key]
        names = [name for name in table if name not in ("lambda", "by", "first")]
        alike = [t for t in alike if t["first"] == table["first"]]
        sums = {name: [math.fsum(x) for x in zip(*(t[name] for t in alike), strict=True)] for name in names}
        merged[key] = {"lambda": table["lambda"], "by": table["by"], "first": table["first"], **sums}
    return list(merged.values())


def figures(table: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """Return (log2 of its first number, bias, explained variance) of each bucket with entries.

    The explained variance of returns that do not vary is NaN.
    """
    rows = []
    columns = zip(
        *(table[n] for n in ("first", "count", "return_sum", "return_sq_sum", "error_sum", "error_sq_sum")), strict=True
    )
    for first, count, return_sum, return_sq_sum, error_sum, error_sq_sum in columns:
        if not count:
            continue
        mean, bias = return_sum / count, error_sum / count
        spread = max(0.0, return_sq_sum / count - mean * mean)
        errors = max(0.0, error_sq_sum / count - bias * bias)
        varies = spread > (SPREAD_FLOOR * mean) ** 2
        rows.append((math.log2(first), bias, 1 - errors / spread if varies else math.nan))
    return rows


def _panels(tables: Sequence[Mapping[str, Any]], by: str) -> list[Panel]:
    lines = {f"returns at lambda {table['lambda']:g}": figures(table) for table in tables if table["by"] == by}

    def series(column: int) -> tuple[Series, ...]:
        return tuple(
            Series(label, [row[0] for row in rows], [row[column] for row in rows], markers=True)
            for label, rows in lines.items()
        )

    return [
        Panel(f"Value bias by {by}", "value minus return", series(1), x_label=_X_LABELS[by], log2_x=True),
        Panel(f"Explained variance by {by}", "1 is perfect", series(2), x_label=_X_LABELS[by], log2_x=True),
    ]
