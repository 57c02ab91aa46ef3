"""Rows and tables of whole iterations."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from functools import cache

from bench import harness
from bench.end_to_end.flops import ATTENTION, PRODUCTS, useful_flops
from bench.end_to_end.providers import Provider
from bench.end_to_end.workloads import Workload

BENCH = "ppo"
PHASES = ("rollout", "score", "update")
# (workload, dtype, family): the least quotient of the family's seconds and icegrt's best mode.
TARGETS = {
    ("uniform", "fp32", "TRL"): 1.45,
    ("uniform", "bf16", "TRL"): 2.5,
    ("uniform", "fp32", "reference"): 1.25,
    ("long-tail", "fp32", "reference"): 2.5,
    ("8-samples", "fp32", "TRL"): 2.0,
}


def case_name(workload: Workload, dtype: str) -> str:
    """Return the case of a workload's rows."""
    return f"{workload.name} {dtype}"


def rows_of(
    workload: Workload,
    dtype: str,
    provider: Provider,
    runs: list[dict],
    peak: float,
    options: argparse.Namespace,
    counts: dict | None = None,
) -> list[dict]:
    """Return the rows of a provider: seconds in all and by phase, tokens per second, operations, shares of the peak.

    Args:
        workload: what was run.
        dtype: "fp32" or "bf16".
        provider: of the figures.
        runs: figures of each timed iteration.
        peak: rate of matrix products, GFLOP/s.
        options: of the bench.
        counts: of the iteration that counted operations; None or empty if the provider does not count.
    """
    counts = counts or {}
    series = {("time", "s"): [r["seconds"] for r in runs], ("processor time", "s"): [r["cpu_seconds"] for r in runs]}
    if provider.is_rollout_only:
        series = {("processor time of rollout", "s"): [r["cpu_seconds"] for r in runs]}
    for phase in runs[0]["phases"]:
        series[f"time of {phase}", "s"] = [r["phases"][phase] for r in runs]
    if "answer_tokens" in runs[0]:
        series["answer tokens per second", "1/s"] = [r["answer_tokens"] / r["seconds"] for r in runs]
    for phase in runs[0].get("slowest_over_fastest", {}):
        series[f"slowest / fastest rank, {phase}", "1"] = [r["slowest_over_fastest"][phase] for r in runs]
    for name, values in shares_of_peak(runs, counts, peak).items():
        series[f"share of the matrix-product peak, {name}", "1"] = values
    for (metric, unit), value in counted(workload, counts).items():
        series[metric, unit] = [value]
    peak_bytes = max(r["peak_bytes"] for r in runs)
    return _rows(workload, dtype, provider, provider.name, series, peak_bytes, options)


def settings_rows(
    workload: Workload, dtype: str, provider: Provider, settings: dict[str, float], options: argparse.Namespace
) -> list[dict]:
    """Return a row for each setting that a provider tried in its warm-up: the seconds of one iteration."""
    rows = []
    for setting, seconds in settings.items():
        print(f"  {setting}: {seconds:.2f} s in the warm-up", flush=True)
        series = {("warm-up iteration", "s"): [seconds]}
        rows += _rows(workload, dtype, provider, f"{provider.name}, {setting}", series, None, options)
    return rows


def _rows(
    workload: Workload,
    dtype: str,
    provider: Provider,
    name: str,
    series: dict[tuple[str, str], list[float]],
    peak_bytes: int | None,
    options: argparse.Namespace,
) -> list[dict]:
    common = {
        "error_vs_fp64": None,
        "peak_bytes": peak_bytes,
        "floor": None,
        **harness._machine("cpu"),
        "versions": versions(provider.python, options.threads),
    }
    rows = []
    for (metric, unit), samples in series.items():
        low, median, high = harness._quantiles(samples)
        row = {"bench": BENCH, "case": case_name(workload, dtype), "provider": name, "metric": metric, "unit": unit}
        rows.append(row | {"median": median, "p20": low, "p80": high, "runs": len(samples)} | common)
    return rows


def shares_of_peak(runs: list[dict], counts: dict, peak: float) -> dict[str, list[float]]:
    """Return, for each phase, the share of the peak at which an iteration's products of weights ran.

    The operations are those that were executed in the counted iteration, padding included, times the quotient of the
    iterations' tokens.
    """
    shares = {}
    for phase, kinds in counts.get("flops", {}).items():
        if phase not in PHASES:
            continue
        shares[phase] = [
            kinds[PRODUCTS] * r["tokens"] / counts["tokens"] / (r["phases"][phase] * peak * 1e9) for r in runs
        ]
    return shares


def counted(workload: Workload, counts: dict) -> dict[tuple[str, str], float]:
    """Return the operations of the counted iteration by metric and unit, and its share of padding."""
    figures: dict[tuple[str, str], float] = {}
    for phase, kinds in counts.get("flops", {}).items():
        if phase not in PHASES:
            continue
        figures[f"executed operations, {phase}", "FLOP"] = kinds[PRODUCTS]
        figures[f"executed operations of attention, {phase}", "FLOP"] = kinds[ATTENTION]
        useful = useful_flops(workload, phase, counts["tokens"], counts["answer_tokens"])
        figures[f"useful operations, {phase}", "FLOP"] = useful
    if "padding" in counts:
        figures["padding", "1"] = counts["padding"]
    return figures


@cache
def versions(python: str, threads: int) -> str:
    """Return the versions of an interpreter's libraries, as JSON."""
    script = (
        "import json, platform, importlib.metadata as m\n"
        "names = [n for n in ('torch', 'transformers', 'trl') if any(d.name == n for d in m.distributions())]\n"
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in names}}))"
    )
    text = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    return json.dumps(json.loads(text) | {"threads": threads})


def print_table(
    workload: Workload, dtype: str, figures: dict[Provider, list[dict]], counts: dict[Provider, dict], peak: float
) -> None:
    """Print each provider's figures, and how many times as long each family's best takes as icegrt's best."""
    whole = {p: runs for p, runs in figures.items() if not p.is_rollout_only}
    for provider, runs in figures.items():
        phases = ", ".join(
            f"{name} {statistics.median(r['phases'][name] for r in runs):.2f}" for name in runs[0]["phases"]
        )
        memory = max(r["peak_bytes"] for r in runs) / 1e9
        seconds = statistics.median(r["seconds"] for r in runs)
        print(f"{provider.name:44s} {seconds:7.2f} s  {memory:5.2f} GB  {phases}")
        for line in details(workload, runs, counts.get(provider, {}), peak):
            print(f"    {line}")
    print_quotients(workload, dtype, whole, lambda r: r["seconds"], "an iteration")
    rollouts = {p: runs for p, runs in figures.items() if "rollout" in runs[0]["phases"]}
    print_quotients(workload, None, rollouts, lambda r: r["phases"]["rollout"], "the rollout")


def details(workload: Workload, runs: list[dict], counts: dict, peak: float) -> list[str]:
    """Return lines of a provider's shares, operations and ranks."""
    lines = []
    shares = {phase: statistics.median(values) for phase, values in shares_of_peak(runs, counts, peak).items()}
    if shares:
        text = ", ".join(f"{phase} {share:.2f}" for phase, share in shares.items())
        lines.append(f"share of the matrix-product peak: {text}")
        operations = counted(workload, counts)
        quotients = ", ".join(
            f"{phase} {operations[f'executed operations, {phase}', 'FLOP'] / useful:.2f}"
            for phase in shares
            if (useful := operations[f"useful operations, {phase}", "FLOP"])
        )
        padding = f"; padding {counts['padding']:.1%}" if "padding" in counts else ""
        lines.append(f"executed / useful operations: {quotients}{padding}")
    ranks = [r["slowest_over_fastest"] for r in runs if "slowest_over_fastest" in r]
    if ranks:
        text = ", ".join(f"{phase} {statistics.median(r[phase] for r in ranks):.2f}" for phase in ranks[0])
        lines.append(f"slowest / fastest rank: {text}")
    return lines


def print_quotients(
    workload: Workload,
    dtype: str | None,
    figures: dict[Provider, list[dict]],
    seconds: Callable[[dict], float],
    what: str,
) -> None:
    """Print how many times as long the best provider of each family takes as icegrt's best; dtype: of the targets."""
    best: dict[str, Provider] = {}
    medians = {p: statistics.median(map(seconds, runs)) for p, runs in figures.items()}
    for provider, median in medians.items():
        if provider.family not in best or median < medians[best[provider.family]]:
            best[provider.family] = provider
    if "icegrt" not in best:
        return
    ours = figures[best["icegrt"]]
    for family, provider in best.items():
        if family == "icegrt":
            continue
        # Rounds in pairs: what slows a round down slows both.
        quotient = statistics.median(
            seconds(other) / seconds(own) for other, own in zip(figures[provider], ours, strict=True)
        )
        target = TARGETS.get((workload.name, dtype, family))
        wanted = f", target {target}" if target else ""
        beside = f"{provider.name} beside {best['icegrt'].name}"
        print(f"  {what}, {family} / icegrt: {quotient:.2f} ({beside}{wanted})")
