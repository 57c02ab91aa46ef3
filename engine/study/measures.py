"""Read the measures of a run: the curve of a field in rows of JSON, or one number of a JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icegrt.config import StudyMeasure
from icegrt.utils.files import restore_json
from icegrt.utils.values import is_number

__all__ = ["MeasureError", "is_curve", "read_curve", "read_value"]


class MeasureError(ValueError):
    """A run lacks a measure. The message names the file and the field."""


def is_curve(measure: StudyMeasure) -> bool:
    """Return whether the measure comes from rows, so that it has a curve."""
    return measure.file.endswith(".jsonl")


def read_curve(run_dir: Path, measure: StudyMeasure) -> list[tuple[float, float]]:
    """Return (x, value) of every row that has the field, in order of x.

    x is the row's `iteration`, else its `step`, else its number. Of two rows with one x the later one counts. A row of
    kind `evaluation` is read as the `evaluation` of its iteration. A last line that was cut off is ignored.

    Raises:
        MeasureError: no such file, a row that is no JSON object, or no row with the field.
    """
    path = run_dir / measure.file
    lines = [line for line in _read(path).split("\n") if line.strip()]
    values: dict[float, float] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = restore_json(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise MeasureError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise MeasureError(f"{path}, line {number}: not a JSON object")
        x = row.get("iteration", row.get("step", number))
        if row.get("kind") == "evaluation":
            row = {"evaluation": row}
        value = _field(row, measure.field)
        if value is not None:
            values[float(x)] = _finite(value, f"{path}, line {number}", measure.field)
    if not values:
        raise MeasureError(f"{path}: no row has the field {measure.field}")
    return sorted(values.items())


def read_value(run_dir: Path, measure: StudyMeasure) -> float:
    """Return the measure of a run.

    Raises:
        MeasureError: the file or the field is missing, the value is not a finite number, or there are fewer rows with
            the field than `last`.
    """
    if is_curve(measure):
        curve = read_curve(run_dir, measure)
        if len(curve) < measure.last:
            raise MeasureError(
                f"{run_dir / measure.file}: {len(curve)} rows have {measure.field}, the mean is over {measure.last}"
            )
        return sum(value for _, value in curve[-measure.last :]) / measure.last
    path = run_dir / measure.file
    try:
        document = restore_json(json.loads(_read(path)))
    except ValueError as error:
        raise error if isinstance(error, MeasureError) else MeasureError(f"{path}: not JSON ({error})") from None
    value = _field(document, measure.field)
    if value is None:
        raise MeasureError(f"{path}: no field {measure.field}")
    return _finite(value, str(path), measure.field)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MeasureError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _field(row: Any, dotted: str) -> Any:
    """Return the value under a dotted name, or None. A key that has dots itself is found, too."""
    if not isinstance(row, Mapping):
        return None
    if dotted in row:
        return row[dotted]
    for name in row:
        if dotted.startswith(f"{name}."):
            value = _field(row[name], dotted[len(name) + 1 :])
            if value is not None:
                return value
    return None


def _finite(value: Any, where: str, field: str) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise MeasureError(f"{where}: {field} is {value!r}, not a finite number")
    return float(value)
