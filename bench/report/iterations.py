"""Tables of whole PPO iterations by workload and dtype: seconds by phase, speed, share of the peak, memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bench.report.charts import Dot, whisker_chart
from bench.rows import Comparison, Row, cases, is_ours, quotient_text, significant, version_of, versions

BENCH = "ppo"
_PHASE, _SHARE = "time of ", "share of the matrix-product peak, "
_SPEED = "answer tokens per second"
_BATCH = re.compile(r", \d+ rows$")


def workloads(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a table and a chart per workload and dtype, in the order of the rows.

    A figure that a provider does not report is a dash: TRL, for one, reports no phases.
    """
    by_case: dict[str, dict[str, list[Row]]] = {}
    for (case, metric), group in cases(rows).items():
        by_case.setdefault(case, {})[metric] = group
    return [_workload(case, metrics) for case, metrics in by_case.items() if "time" in metrics]


def _workload(case: str, metrics: dict[str, list[Row]]) -> dict[str, Any]:
    by_provider = {metric: {row["provider"]: row for row in group} for metric, group in metrics.items()}
    times = by_provider["time"]
    phases = [metric.removeprefix(_PHASE) for metric in metrics if metric.startswith(_PHASE)]
    shares = [metric.removeprefix(_SHARE) for metric in metrics if metric.startswith(_SHARE)]
    best = _best_batches(times)

    def median(metric: str, provider: str) -> float | None:
        row = by_provider.get(metric, {}).get(provider)
        return None if row is None else row["median"]

    lines = []
    for provider, row in times.items():
        comparison = Comparison(times["icegrt"], row) if "icegrt" in times and provider != "icegrt" else None
        lines.append(
            {
                "provider": provider,
                "is_ours": is_ours(provider),
                "is_best": provider in best,
                "seconds": significant(row["median"]),
                "spread": spread(row),
                "phases": [significant(median(_PHASE + phase, provider)) for phase in phases],
                "speed": significant(median(_SPEED, provider)),
                "shares": [_percent(median(_SHARE + phase, provider)) for phase in shares],
                "memory": "\N{EN DASH}" if row["peak_bytes"] is None else significant(row["peak_bytes"] / 1e9),
                "quotient": "" if comparison is None else quotient_text(comparison),
                "runs": row["runs"],
            }
        )
    dots = {p: [Dot(0 if is_ours(p) else 1, r["p20"], r["median"], r["p80"], _title(r))] for p, r in times.items()}
    providers_by_versions: dict[str, list[str]] = {}
    for provider, row in times.items():
        providers_by_versions.setdefault(version_words(row), []).append(provider)
    return {
        "case": case,
        "versions": [f"{'; '.join(names)}: {words}" for words, names in providers_by_versions.items()],
        "phases": phases,
        "shares": shares,
        "lines": lines,
        "chart": whisker_chart(f"seconds of an iteration, {case}", "seconds of an iteration", dots),
    }


def version_words(row: Row) -> str:
    """Return the versions of a provider that runs several packages; of icegrt, its commit too."""
    named = ", ".join(
        f"{name} {version}" for name, version in versions(row).items() if name not in ("python", "threads")
    )
    return f"{version_of(row)}, {named}" if is_ours(row["provider"]) else named


def spread(row: Row) -> str:
    """Return the 20th and the 80th percentile of a row."""
    return f"{significant(row['p20'])} .. {significant(row['p80'])}"


def _best_batches(times: dict[str, Row]) -> set[str]:
    """Return the fastest of the providers that differ by their batch alone."""
    families: dict[str, list[str]] = {}
    for provider in times:
        families.setdefault(_BATCH.sub("", provider), []).append(provider)
    return {min(names, key=lambda name: times[name]["median"]) for names in families.values() if len(names) > 1}


def _percent(share: float | None) -> str:
    return "\N{EN DASH}" if share is None else f"{100 * share:.0f}%"


def _title(row: Row) -> str:
    return f"{row['provider']}: {significant(row['median'])} {row['unit']}, {spread(row)}, {row['runs']} runs"
