"""The rows of benches: keys, folders, and which provider of a case is icegrt's.

Nothing here imports torch: the report, the README's section and `make check` read rows without the benches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

KEYS = (
    "bench",
    "case",
    "provider",
    "metric",
    "unit",
    "median",
    "p20",
    "p80",
    "runs",
    "error_vs_fp64",
    "peak_bytes",
    "floor",
    "device",
    "machine",
    "driver",
    "versions",
    "commit",
    "date",
)
RESULTS = Path(__file__).parent / "results"
HISTORY = "history"

# What icegrt runs in a case is the first of these that the case has: `auto` selects backends in this order. The plain
# PyTorch reference is icegrt's where an operation has no other backend, and an alternative everywhere else.
OURS = ("icegrt", "ours", "triton", "cpp", "chunked", "reference")
# What a provider leaves out, so that a reader does not take it for the same work.
LESS_WORK = {
    ("linear_ppo_loss", "three products"): "the three matrix products alone, no loss",
    ("lm_logits", "halves"): "rounds its logits to bf16",
}
# Package of a provider by the beginning of its name; all others are PyTorch.
_PACKAGES = (
    ("transformers", "transformers"),
    ("TRL", "trl"),
    ("liger-kernel", "liger-kernel"),
    ("flash-attn", "flash-attn"),
    ("cut-cross-entropy", "cut-cross-entropy"),
    ("plain Python", "python"),
    ("heap", "python"),
    ("Karmarkar-Karp", "python"),
)


@dataclass(frozen=True)
class Comparison:
    """icegrt beside one alternative in one case, from two rows of the same run.

    Attributes:
        ours: icegrt's row.
        other: the alternative's row, of the same bench, case and metric.
    """

    ours: Row
    other: Row

    @property
    def key(self) -> tuple[str, str, str]:
        """Case, metric and alternative."""
        return self.other["case"], self.other["metric"], self.other["provider"]

    @property
    def quotient(self) -> float:
        """How many times as good icegrt's median is; above 1, icegrt is faster (or leaves less)."""
        return _quotient(self.ours["median"], self.other["median"], self.other)

    @property
    def interval(self) -> tuple[float, float]:
        """The quotient of the worse and of the better fifths: all that both p20..p80 allow."""
        ours, other = ((row["p20"], row["p80"]) for row in (self.ours, self.other))
        ends = (_quotient(a, b, self.other) for a, b in ((ours[0], other[1]), (ours[1], other[0])))
        low, high = sorted(ends)
        return low, high

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 1 out."""
        low, high = self.interval
        return low > 1 or high < 1


def load(folder: Path) -> dict[str, list[Row]]:
    """Return the rows of a device's folder by file name without suffix; keys that older rows lack are None.

    Raises:
        ValueError: a file holds something else.
    """
    benches = {}
    for path in sorted(folder.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "median" in row for row in rows):
            raise ValueError(f"{path} is no list of bench rows")
        if rows:
            benches[path.stem] = [dict.fromkeys(KEYS) | row for row in rows]
    return benches


def devices(results: Path = RESULTS) -> list[Path]:
    """Return the folders of devices that have rows."""
    folders = (path for path in results.iterdir() if path.is_dir() and path.name != HISTORY) if results.is_dir() else ()
    return sorted(folder for folder in folders if any(folder.glob("*.json")))


def versions(row: Row) -> dict[str, str]:
    """Return the versions that a row records, by package, with `threads`."""
    return {name: str(value) for name, value in json.loads(row["versions"] or "{}").items()}


def package_of(provider: str) -> str:
    """Return the package that a provider runs."""
    if provider == "loop":
        return "python"
    return next((package for name, package in _PACKAGES if provider.startswith(name)), "torch")


def version_of(row: Row) -> str:
    """Return the package and version of a row's provider, in words; of icegrt's own providers, the commit."""
    if is_ours(row["provider"]):
        return f"icegrt {row['commit'] or 'at an unknown commit'}"
    package = package_of(row["provider"])
    version = versions(row).get(package)
    return f"{package} {version}" if version else "version not recorded"


def provider_words(row: Row) -> str:
    """Return a row's provider with its version, in words."""
    name = "PyTorch reference" if row["provider"] == OURS[-1] else row["provider"]
    return f"{name} ({version_of(row)})"


def is_ours(provider: str) -> bool:
    """Whether a provider is icegrt, in a mode or backend of it; the plain PyTorch reference is not."""
    return provider.split(",")[0] in OURS[:-1] or provider.startswith("icegrt ")


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is the better one."""
    return metric in ("throughput", "memory_floor") or metric.startswith("share") or metric.endswith("per second")


def is_speed(metric: str) -> bool:
    """Whether a metric says how fast a provider is, or how even its result: only these are compared."""
    return metric in ("time", "throughput", "max_over_mean") or metric.startswith("time of ")


def cases(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return rows by case and metric, in the order of the rows."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["case"], row["metric"]), []).append(row)
    return grouped


def ours_of(rows: Sequence[Row]) -> Row | None:
    """Return icegrt's row among those of a case, or None."""
    by_provider = {row["provider"]: row for row in rows}
    return next((by_provider[name] for name in OURS if name in by_provider), None)


def compared(rows: Iterable[Row]) -> list[Comparison]:
    """Return icegrt beside every alternative, case by case; modes of icegrt are no alternatives."""
    found = []
    for (_, metric), group in cases(rows).items():
        ours = ours_of(group)
        if ours is None or not is_speed(metric):
            continue
        for row in group:
            if row is ours or is_ours(row["provider"]) or min(row["p20"], ours["p20"]) <= 0:
                continue
            found.append(Comparison(ours, row))
    return found


def share_of_floor(row: Row) -> float | None:
    """Return the floor over the median, or None without a floor; a rollout's `memory_floor` is that share itself."""
    if row["metric"] == "memory_floor":
        return row["median"]
    return row["floor"] / row["median"] if row["floor"] and row["median"] > 0 else None


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, grouped by thousands; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, decimals)}f}"


def quotient_text(comparison: Comparison) -> str:
    """Return a quotient with its interval: `1.52 [1.40, 1.60]`."""
    low, high = comparison.interval
    return f"{significant(comparison.quotient)} [{significant(low)}, {significant(high)}]"


def _quotient(ours: float, other: float, row: Row) -> float:
    return ours / other if higher_is_better(row["metric"]) else other / ours
