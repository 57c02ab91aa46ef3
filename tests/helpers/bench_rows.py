"""Bench rows made by hand, as `bench.harness` writes them."""

import json

from bench.rows import KEYS

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "threads": 2, "transformers": "5.1.0"}


def row(provider, median, *, case="A8", metric="time", unit="ms", spread=0.02, **changes):
    """A row whose 20th and 80th percentiles are `spread` below and above the median."""
    made = dict.fromkeys(KEYS) | {
        "bench": "gae",
        "case": case,
        "provider": provider,
        "metric": metric,
        "unit": unit,
        "median": median,
        "p20": median * (1 - spread),
        "p80": median * (1 + spread),
        "runs": 9,
        "device": "x86_64",
        "machine": "A Processor, 2 cores",
        "versions": json.dumps(VERSIONS),
        "commit": "abc1234",
        "date": "2026-01-31",
    }
    return made | changes


def write(folder, **benches):
    """Write rows by bench into a device's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in benches.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder
