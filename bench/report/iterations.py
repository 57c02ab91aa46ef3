"""Tables of whole PPO iterations by workload and dtype: seconds by phase, speed, share of the peak, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.report.charts import Dot, whisker_chart
from bench.rows import Comparison, Row, cases, is_ours, quotient_text, significant, version_of, versions

BENCH = "ppo"
_PHASE, _SHARE, _RANKS = "time of ", "share of the matrix-product peak, ", "slowest / fastest rank, "
_SPEED, _WARM_UP, _PADDING = "answer tokens per second", "warm-up iteration", "padding"
_EXECUTED, _USEFUL = "executed operations, ", "useful operations, "
_DASH = "\N{EN DASH}"


def workloads(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the tables and the chart of each workload and dtype, in the order of the rows.

    A figure that a provider does not report is a dash: continuous batching, for one, only samples.
    """
    by_case: dict[str, dict[str, dict[str, Row]]] = {}
    for (case, metric), group in cases(rows).items():
        by_case.setdefault(case, {})[metric] = {row["provider"]: row for row in group}
    return [_workload(case, metrics) for case, metrics in by_case.items() if "time" in metrics]


def _workload(case: str, metrics: dict[str, dict[str, Row]]) -> dict[str, Any]:
    times = metrics["time"]
    phases = [metric.removeprefix(_PHASE) for metric in metrics if metric.startswith(_PHASE)]
    shares = [metric.removeprefix(_SHARE) for metric in metrics if metric.startswith(_SHARE)]
    rows = {p: row for metric in metrics if metric != _WARM_UP for p, row in metrics[metric].items()}

    def figure(metric: str, provider: str, show: Callable[[float], str] = significant) -> str:
        row = metrics.get(metric, {}).get(provider)
        return _DASH if row is None else show(row["median"])

    def quotient(metric: str, provider: str) -> str:
        group = metrics.get(metric, {})
        if provider == "icegrt" or provider not in group or "icegrt" not in group:
            return ""
        return quotient_text(Comparison(group["icegrt"], group[provider]))

    lines = [
        {
            "provider": provider,
            "is_ours": is_ours(provider),
            "seconds": figure("time", provider),
            "spread": spread(times[provider]) if provider in times else _DASH,
            "quotient": quotient("time", provider),
            "phases": [figure(_PHASE + phase, provider) for phase in phases],
            "rollout_quotient": quotient(_PHASE + "rollout", provider),
            "speed": figure(_SPEED, provider),
            "shares": [figure(_SHARE + phase, provider, _percent) for phase in shares],
            "memory": _DASH if row["peak_bytes"] is None else significant(row["peak_bytes"] / 1e9),
            "runs": max(group[provider]["runs"] for group in metrics.values() if provider in group),
        }
        for provider, row in rows.items()
    ]
    providers_by_versions: dict[str, list[str]] = {}
    for provider, row in rows.items():
        providers_by_versions.setdefault(version_words(row), []).append(provider)
    dots = {p: [Dot(0 if is_ours(p) else 1, r["p20"], r["median"], r["p80"], _title(r))] for p, r in times.items()}
    return {
        "case": case,
        "versions": [f"{'; '.join(names)}: {words}" for words, names in providers_by_versions.items()],
        "phases": phases,
        "shares": shares,
        "lines": lines,
        "tried": [f"{p}: {significant(row['median'])} s" for p, row in metrics.get(_WARM_UP, {}).items()],
        "operations": _operations(metrics, [*rows]),
        "chart": whisker_chart(f"seconds of an iteration, {case}", "seconds of an iteration", dots),
    }


def _operations(metrics: dict[str, dict[str, Row]], providers: Sequence[str]) -> dict[str, Any]:
    """Return executed and useful operations, padding and ranks of the providers that report any of them."""
    phases = [metric.removeprefix(_EXECUTED) for metric in metrics if metric.startswith(_EXECUTED)]
    ranks = [metric.removeprefix(_RANKS) for metric in metrics if metric.startswith(_RANKS)]
    lines = []
    for provider in providers:

        def value(metric: str, provider: str = provider) -> float | None:
            row = metrics.get(metric, {}).get(provider)
            return None if row is None else row["median"]

        counts = [(value(_EXECUTED + phase), value(_USEFUL + phase)) for phase in phases]
        slowest = [f"{phase} {significant(v)}" for phase in ranks if (v := value(_RANKS + phase)) is not None]
        padding = value(_PADDING)
        if any(executed is not None for executed, _ in counts) or padding is not None or slowest:
            lines.append(
                {
                    "provider": provider,
                    "is_ours": is_ours(provider),
                    "counts": [_quotient_of_operations(*count) for count in counts],
                    "padding": _DASH if padding is None else _percent(padding),
                    "ranks": ", ".join(slowest) or _DASH,
                }
            )
    return {"phases": phases, "lines": lines}


def _quotient_of_operations(executed: float | None, useful: float | None) -> str:
    if executed is None:
        return _DASH
    over = f" ({significant(executed / useful)})" if useful else ""
    return f"{significant(executed / 1e9)} / {significant(None if useful is None else useful / 1e9)}{over}"


def version_words(row: Row) -> str:
    """Return the versions of a provider that runs several packages; of icegrt, its commit too."""
    named = ", ".join(
        f"{name} {version}" for name, version in versions(row).items() if name not in ("python", "threads")
    )
    return f"{version_of(row)}, {named}" if is_ours(row["provider"]) else named


def spread(row: Row) -> str:
    """Return the 20th and the 80th percentile of a row."""
    return f"{significant(row['p20'])} .. {significant(row['p80'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _title(row: Row) -> str:
    return f"{row['provider']}: {significant(row['median'])} {row['unit']}, {spread(row)}, {row['runs']} runs"
