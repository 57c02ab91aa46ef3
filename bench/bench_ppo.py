"""Whole PPO iterations: icegrt in each of its modes, the reference path and TRL, in turn, each in its own process.

All have the same models, prompts and recipe: one pass of one minibatch over an iteration's episodes. The reference path
and TRL try four batch sizes, which are all listed, and run at the fastest. TRL needs the environment of
`make bench-peers`. Continuous batching of transformers samples from the same prompts and trains nothing: its rows are
those of a rollout. After the timed rounds one iteration of each provider counts its operations.

Without --workloads and --dtypes it runs uniform in fp32 and bf16, and long-tail and 8-samples in fp32: about half an
hour on two idle cores. Rows of other workloads stay in the file. --only leaves providers out; 135M has no memory for
all of them at once.

    python -m bench.bench_ppo
    python -m bench.bench_ppo --workloads uniform --dtypes fp32 --rounds 5
    python -m bench.bench_ppo --workloads 135M,prompts=2,samples=1,answer_tokens=8 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import harness
from bench.end_to_end.figures import BENCH, case_name, print_table, rows_of, settings_rows
from bench.end_to_end.flops import peak_gflops
from bench.end_to_end.protocol import Worker, WorkerError
from bench.end_to_end.providers import PEERS, PEERS_PYTHON, Provider, providers
from bench.end_to_end.ranks import RankWorkers
from bench.end_to_end.workloads import WORKLOADS, Workload, workload_of
from icegrt.utils.cpu import bf16_slowdown

DEFAULT_CASES = [
    (WORKLOADS[name], dtype)
    for name, dtype in (("uniform", "fp32"), ("uniform", "bf16"), ("long-tail", "fp32"), ("8-samples", "fp32"))
]


def chosen(workload: Workload, dtype: str, options: argparse.Namespace) -> list[Provider]:
    """Return the providers that the options name; all by default."""
    made = providers(workload, dtype, options.peers, options.threads)
    return [p for p in made if not options.only or p.name in options.only]


def run(workload: Workload, dtype: str, options: argparse.Namespace) -> list[dict]:
    """Run a workload's providers in turn; return the rows. A provider whose process ends is left out."""
    workers: dict[Provider, Worker | RankWorkers] = {}
    rows: list[dict] = []
    try:
        # 1. Start one after another: warm-ups do not overlap.
        for provider in chosen(workload, dtype, options):
            print(f"{workload.name} {dtype}: {provider.name}", flush=True)
            worker = provider.start(options)
            try:
                settings = worker.wait_until_ready()
            except WorkerError as error:
                print(f"  left out: {error}; see {options.log}")
                worker.close()
                continue
            rows += settings_rows(workload, dtype, provider, settings, options)
            workers[provider.at(settings)] = worker
        # 2. One iteration of each per round.
        figures: dict[Provider, list[dict]] = {provider: [] for provider in workers}
        counts: dict[Provider, dict] = {}
        peaks = []
        for _ in range(options.rounds):
            peaks.append(peak_gflops(dtype, options.threads))
            for provider in [*figures]:
                try:
                    figures[provider].append(workers[provider].step())
                except WorkerError as error:
                    print(f"  left out: {error}; see {options.log}")
                    del figures[provider]
        # 3. Count, when no more times are taken.
        for provider in figures:
            try:
                counts[provider] = workers[provider].count()
            except WorkerError as error:
                print(f"  not counted: {error}; see {options.log}")
                counts[provider] = {}
    finally:
        for worker in workers.values():
            worker.close()
    peak = statistics.median(peaks)
    print(f"matrix products reach {peak:.0f} GFLOP/s")
    print_table(workload, dtype, figures, counts, peak)
    for provider, runs in figures.items():
        rows += rows_of(workload, dtype, provider, runs, peak, options, counts[provider])
    return rows


def rows_of_other_cases(path: Path, cases: Sequence[tuple[Workload, str]]) -> list[dict]:
    """Return the rows of a file whose workload and dtype do not run now; none if there is no file."""
    names = {case_name(workload, dtype) for workload, dtype in cases}
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [dict.fromkeys(harness.KEYS) | row for row in rows if row["case"] not in names]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads",
        nargs="+",
        type=workload_of,
        metavar="NAME[,SIZE=NUMBER...]",
        help="; ".join(f"{name}: {workload.summary}" for name, workload in WORKLOADS.items()),
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("fp32", "bf16"),
        help="both, if workloads are named; bf16 only where the CPU has it",
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of providers, such as 'icegrt, lora'")
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each provider")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch in each process, or of all its ranks")
    parser.add_argument("--quick", action="store_true", help="the first case and two rounds")
    parser.add_argument("--log", type=Path, default=Path("bench_ppo.log"), help="what the workers' libraries print")
    parser.add_argument("--device", default="cpu", choices=("cpu",), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of <device>/ppo.json and .csv")
    options = parser.parse_args()
    cases = DEFAULT_CASES
    if options.workloads or options.dtypes:
        workloads = options.workloads or [*dict.fromkeys(workload for workload, _ in DEFAULT_CASES)]
        cases = [(workload, dtype) for workload in workloads for dtype in options.dtypes or ("fp32", "bf16")]
    slowdown = bf16_slowdown()
    if not options.dtypes and slowdown > 1:
        print(
            f"bf16 is left out: on this CPU a product in bf16 takes {slowdown:.0f} times as long; --dtypes bf16 runs it"
        )
        cases = [(workload, dtype) for workload, dtype in cases if dtype != "bf16"]
    if options.quick:
        cases, options.rounds = cases[:1], 2
    if "TRL" in options.peers and not PEERS_PYTHON.exists():
        print("TRL is left out: `make bench-peers` makes its environment")
        options.peers.remove("TRL")
    rows = rows_of_other_cases(harness.folder_of(options) / f"{BENCH}.json", cases)
    for workload, dtype in cases:
        rows += run(workload, dtype, options)
        harness.write(BENCH, rows, options)  # what was measured stays if a later case fails


if __name__ == "__main__":
    main()
