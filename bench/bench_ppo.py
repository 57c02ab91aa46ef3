"""Whole PPO iterations: icegrt in each of its modes, the reference path and TRL, in turn, each in its own process.

All have the same models, prompts and recipe: one pass of one minibatch over an iteration's episodes. The reference path
and TRL run at several batch sizes, which are all listed. TRL needs the environment of `make bench-peers`.

    python -m bench.bench_ppo                                    # the workloads of one machine, fp32 and bf16
    python -m bench.bench_ppo --workloads uniform --dtypes fp32 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from bench.end_to_end.flops import peak_gflops, useful_flops
from bench.end_to_end.protocol import ROOT, Worker, WorkerError
from bench.end_to_end.workloads import WORKLOADS, Workload

BENCH = "ppo"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
# Modes of icegrt: overrides of the configuration.
MODES = {
    "icegrt": (),
    "icegrt, prompts shared": ("ppo.minibatch_by=prompt",),
    "icegrt, lora": ("ppo.sharing=lora", "ppo.critic.init=actor"),
    "icegrt, reused log-probs": ("ppo.reuse_update_logprob=true", "ppo.kl_logprobs=rollout"),
}
BATCHES = (8, 16, 32, 64)
# (workload, dtype, peer): the least quotient of the peer's seconds and icegrt's best mode.
TARGETS = {
    ("uniform", "fp32", "TRL"): 1.45,
    ("uniform", "bf16", "TRL"): 2.5,
    ("uniform", "fp32", "reference"): 1.25,
    ("long-tail", "fp32", "reference"): 2.5,
    ("8-samples", "fp32", "TRL"): 2.0,
}


@dataclass(frozen=True)
class Provider:
    """A way to run an iteration: its name, the interpreter, the module with its arguments, and whose it is."""

    name: str
    family: str
    python: str
    module: str
    arguments: list[str]


def providers(workload: Workload, dtype: str, peers: Sequence[str]) -> list[Provider]:
    """Return all providers of a workload."""
    work = [workload.name, dtype]
    batches = [rows for rows in BATCHES if rows <= workload.episodes]
    made = []
    for name, keys in MODES.items():
        if name == "icegrt, prompts shared" and workload.samples == 1:
            continue
        made.append(Provider(name, "icegrt", sys.executable, "bench.end_to_end.icegrt_worker", [*work, *keys]))
    if "reference" in peers:
        module = "bench.end_to_end.reference_worker"
        for rows in batches:
            made.append(Provider(f"reference, {rows} rows", "reference", sys.executable, module, [*work, str(rows)]))
        if workload.stop_tokens:  # answers of many lengths
            for rows in batches:
                name, arguments = f"reference by length, {rows} rows", [*work, str(rows), "--by-length"]
                made.append(Provider(name, "reference by length", sys.executable, module, arguments))
    if "TRL" in peers:
        for rows in batches:
            arguments = [*work, str(rows)]
            made.append(Provider(f"TRL, {rows} rows", "TRL", str(PEERS), "bench.peers.trl_worker", arguments))
    return made


def run(workload: Workload, dtype: str, options: argparse.Namespace) -> list[dict]:
    """Run a workload's providers in turn; return the rows."""
    workers: dict[Provider, Worker] = {}
    figures: dict[Provider, list[dict]] = {}
    try:
        # 1. Start one after another: warm-ups do not overlap.
        for provider in providers(workload, dtype, options.peers):
            print(f"{workload.name} {dtype}: {provider.name}", flush=True)
            worker = Worker(
                provider.name, provider.python, provider.module, provider.arguments, options.threads, options.log
            )
            try:
                worker.wait_until_ready()
            except WorkerError as error:
                print(f"  left out: {error}; see {options.log}")
                worker.close()
                continue
            workers[provider], figures[provider] = worker, []
        # 2. One iteration of each per round.
        peaks = []
        for _ in range(options.rounds):
            peaks.append(peak_gflops(dtype, options.threads))
            for provider, worker in workers.items():
                figures[provider].append(worker.step())
    finally:
        for worker in workers.values():
            worker.close()
    peak = statistics.median(peaks)
    print(f"matrix products reach {peak:.0f} GFLOP/s")
    rows = [row for p in figures for row in rows_of(workload, dtype, p, figures[p], peak, options)]
    print_table(workload, dtype, figures, peak)
    return rows


def rows_of(
    workload: Workload, dtype: str, provider: Provider, runs: list[dict], peak: float, options: argparse.Namespace
) -> list[dict]:
    """Return the rows of a provider: seconds in all and by phase, tokens per second, share of the peak."""
    series = {("time", "s"): [r["seconds"] for r in runs], ("processor time", "s"): [r["cpu_seconds"] for r in runs]}
    for phase in runs[0]["phases"]:
        series[f"time of {phase}", "s"] = [r["phases"][phase] for r in runs]
    if "answer_tokens" in runs[0]:
        series["answer tokens per second", "1/s"] = [r["answer_tokens"] / r["seconds"] for r in runs]
        for phase in ("score", "update"):
            share = [
                useful_flops(workload, phase, r["tokens"], r["answer_tokens"]) / (r["phases"][phase] * peak * 1e9)
                for r in runs
            ]
            series[f"share of the matrix-product peak, {phase}", "1"] = share
    case = f"{workload.name} {dtype}"
    rows = []
    for (metric, unit), samples in series.items():
        low, median, high = harness._quantiles(samples)
        rows.append(
            {
                "bench": BENCH,
                "case": case,
                "provider": provider.name,
                "metric": metric,
                "unit": unit,
                "median": median,
                "p20": low,
                "p80": high,
                "runs": len(samples),
                "error_vs_fp64": None,
                "peak_bytes": max(r["peak_bytes"] for r in runs),
                "floor": None,
                **harness._machine("cpu"),
                "versions": versions(provider, options.threads),
            }
        )
    return rows


def versions(provider: Provider, threads: int) -> str:
    """Return the versions of a provider's libraries, as JSON."""
    script = (
        "import json, platform, importlib.metadata as m\n"
        "names = [n for n in ('torch', 'transformers', 'trl') if any(d.name == n for d in m.distributions())]\n"
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in names}}))"
    )
    text = subprocess.run([provider.python, "-c", script], capture_output=True, text=True, check=True).stdout
    return json.dumps(json.loads(text) | {"threads": threads})


def print_table(workload: Workload, dtype: str, figures: dict[Provider, list[dict]], peak: float) -> None:
    """Print seconds of each provider, and how many times as long each family's best takes as icegrt's best."""
    medians = {p: statistics.median(r["seconds"] for r in runs) for p, runs in figures.items()}
    best: dict[str, Provider] = {}
    for provider, seconds in medians.items():
        if provider.family not in best or seconds < medians[best[provider.family]]:
            best[provider.family] = provider
    for provider, runs in figures.items():
        phases = ", ".join(
            f"{name} {statistics.median(r['phases'][name] for r in runs):.2f}" for name in runs[0]["phases"]
        )
        memory = max(r["peak_bytes"] for r in runs) / 1e9
        mark = "*" if best[provider.family] is provider else " "
        print(f"{mark} {provider.name:32s} {medians[provider]:7.2f} s  {memory:5.2f} GB  {phases}")
    ours = figures.get(best["icegrt"]) if "icegrt" in best else None
    for family, provider in best.items():
        if family == "icegrt" or ours is None:
            continue
        # Rounds in pairs: what slows a round down slows both.
        quotient = statistics.median(
            theirs["seconds"] / own["seconds"] for theirs, own in zip(figures[provider], ours, strict=True)
        )
        target = TARGETS.get((workload.name, dtype, family))
        wanted = f", asked {target}" if target else ""
        print(f"  {family} / icegrt: {quotient:.2f} ({provider.name} beside {best['icegrt'].name}{wanted})")


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["uniform", "long-tail", "8-samples"])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--peers", nargs="*", choices=("reference", "TRL"), default=["reference", "TRL"])
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each provider")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch in each process")
    parser.add_argument("--quick", action="store_true", help="the first workload in fp32, two rounds")
    parser.add_argument("--log", type=Path, default=Path("bench_ppo.log"), help="what the workers' libraries print")
    parser.add_argument("--device", default="cpu", choices=("cpu",), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of <device>/ppo.json and .csv")
    options = parser.parse_args()
    if options.quick:
        options.workloads, options.dtypes, options.rounds = ["uniform"], ["fp32"], 2
    if "TRL" in options.peers and not PEERS.exists():
        print("TRL is left out: `make bench-peers` makes its environment")
        options.peers.remove("TRL")
    rows = [row for w in options.workloads for dtype in options.dtypes for row in run(WORKLOADS[w], dtype, options)]
    harness.write(BENCH, rows, options)


if __name__ == "__main__":
    main()
