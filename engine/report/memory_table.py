"""The table of planned and measured memory on a report's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icegrt.errors import CheckpointError
from icegrt.metrics import PHASE_LABELS
from icegrt.report.text import number, percent
from icegrt.utils.files import read_object
from icegrt.utils.values import is_number

MEMORY_FILE = "memory.json"


def memory_table(run_dir: Path) -> dict[str, Any] | None:
    """Return planned and measured peaks of a run with a plan (`ppo.memory_plan`).

    Args:
        run_dir: folder of the run, with or without memory.json.

    Returns:
        `measure`, what was measured, and `rows` of (phase, planned GB, measured GB, measured / planned). None if the
        run has no such file, or it is no complete one.
    """
    path = run_dir / MEMORY_FILE
    if not path.exists():
        return None
    try:
        document = read_object(path)
        planned, measured, measure = document["planned"], document["measured"], document["measure"]
        peaks = [(name, size, measured[name]) for name, size in planned.items() if name in measured]
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
    rows = [
        (PHASE_LABELS.get(name, name), number(size / 1e9), number(peak / 1e9), percent(peak / size) if size else "")
        for name, size, peak in peaks
        if is_number(size) and is_number(peak)
    ]
    return {"measure": str(measure), "rows": rows} if rows else None
