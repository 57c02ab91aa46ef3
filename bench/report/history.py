"""Headline quotients of releases, recorded from the rows of all devices: small files in bench/results/history."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.headlines import HEADLINES, find
from bench.rows import HISTORY, RESULTS, devices, significant
from bench.rows import load as load_rows

_VERSION = re.compile(r"\d+(\.\d+)*([a-z.]\w*)?")


def record(version: str, date: str, results: Path = RESULTS) -> Path:
    """Write <results>/history/<version>.json from the present rows; return its path.

    Args:
        version: of the release, as `0.2` or `0.2.1rc1`.
        date: of the release, as 2026-01-31.
        results: folder with a folder of rows per device.

    Raises:
        ValueError: the version has another form, or no device has a headline.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is no version such as 0.2 or 0.2.1rc1")
    quotients = {
        folder.name: {
            headline.key: {
                "quotient": comparison.quotient,
                "interval": list(comparison.interval),
                "case": comparison.other["case"],
                "against": comparison.other["provider"],
                "commit": comparison.ours["commit"],
            }
            for headline, comparison in find(load_rows(folder))
        }
        for folder in devices(results)
    }
    if not any(quotients.values()):
        raise ValueError(f"{results} has no headline to record")
    path = results / HISTORY / f"{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": version, "date": date, "devices": quotients}, indent=1) + "\n")
    return path


def load(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the entries of the history, oldest first."""
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in (results / HISTORY).glob("*.json")]
    return sorted(entries, key=lambda entry: (entry["date"], entry["version"]))


def table(device: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return releases and their quotients by headline, or None if fewer than two releases have the device."""
    found = [entry for entry in entries if entry["devices"].get(device)]
    if len(found) < 2:
        return None
    lines = []
    for headline in HEADLINES:
        figures = [entry["devices"][device].get(headline.key) for entry in found]
        if any(figures):
            texts = ["" if f is None else f"{significant(f['quotient'])}, {f['against']}" for f in figures]
            lines.append({"label": headline.label, "quotients": texts})
    return {"versions": [f"{entry['version']} ({entry['date']})" for entry in found], "lines": lines}
