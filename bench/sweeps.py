"""What the kernel benches share beside the harness: peers where they are installed, and plots against A and V."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import torch


def peer(module: str, name: str):
    """An attribute of a package that may not be installed, or None."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def floor_ms(options, *, flops: float = 0.0, traffic: float = 0.0) -> float | None:
    """Milliseconds that products of `flops` or `traffic` bytes take on a device with measured rates, else None."""
    if options.device != "cuda" or "H200" not in torch.cuda.get_device_name():
        return None
    return max(flops / 790e12, traffic / 4.3e12) * 1e3


def plot(rows: list[dict], path: Path) -> None:
    """Time and peak memory against actions and against vocabulary, one line a provider; needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), squeeze=False)
    for column, dimension in enumerate("AV"):
        for row, (key, unit) in enumerate((("median", "ms"), ("peak_bytes", "bytes"))):
            axis = axes[row][column]
            for provider in dict.fromkeys(r["provider"] for r in rows):
                points = _points([r for r in rows if r["provider"] == provider and r[key]], dimension, key)
                axis.plot(*zip(*points), marker="o", label=provider) if points else None
            axis.set(xlabel=f"{dimension} (other sizes fixed)", ylabel=unit, xscale="log", yscale="log")
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
    print(f"wrote {path.with_suffix('.png')}")


def _points(rows: list[dict], dimension: str, key: str) -> list[tuple[int, float]]:
    """(size, value) over the cases that differ in this dimension alone from most others."""
    sized = [({d: int(n) for d, n in re.findall(r"\b([AV])(\d+)", r["case"])}, r[key]) for r in rows]
    sized = [(sizes, value) for sizes, value in sized if dimension in sizes]
    other = "V" if dimension == "A" else "A"
    fixed = [sizes.get(other) for sizes, _ in sized]
    usual = max(set(fixed), key=fixed.count) if fixed else None
    return sorted((sizes[dimension], value) for sizes, value in sized if sizes.get(other) == usual)
