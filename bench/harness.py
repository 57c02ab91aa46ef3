"""Interleaved comparisons: every provider runs on the same tensors, is checked against fp64, and is timed in turn.

Providers that are timed one after the other run at different clocks and with different caches; rounds of one call each
avoid that. A row has versions, device, commit and error beside the time, so that it can be read later.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures peaks reports its start and stop

import torch

from bench.rows import KEYS, RESULTS

# All benches together must end in minutes on a GPU: a case stops after this long, but not before this many rounds.
CASE_SECONDS, ROUNDS_MIN = 5.0, 3
# Packages whose versions a row records, if they are installed.
PACKAGES = ("triton", "transformers", "liger-kernel", "flash-attn", "cut-cross-entropy")
FLUSH_BYTES = 1 << 30  # many times any last-level cache
# Milliseconds that the kernels here must stay within on one H200, printed beside the figures of the case.
TARGETS = {
    ("linear_logprobs", "A8192 V151936 H4096 bfloat16 forward"): 15.5,
    ("linear_ppo_loss", "A8192 V151936 H4096 bfloat16 both"): 46.0,
    ("token_logprobs", "A8192 V151936 bfloat16 both"): 2.0,
    ("shaped_gae", "1M ragged"): 0.015,
    ("ppo_policy_loss", "A1048576 both"): 0.015,
    ("value_loss", "A1048576 both"): 0.015,
}


def arguments(description: str, **choices: tuple[str, ...]) -> argparse.Namespace:
    """Parse the options that every bench has. `choices`: options of this one, each with its values; all by default."""
    parser = argparse.ArgumentParser(description=description)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=list(values), help="default: all")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds: seconds, not minutes")
    parser.add_argument("--rounds", type=int, help="timed rounds per case (default: 30, or 7 with --quick)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where <device>/<bench>.json and .csv are written")
    options = parser.parse_args()
    options.rounds = options.rounds or (7 if options.quick else 30)
    torch.manual_seed(0)
    return options


def compare(
    bench: str,
    case: str,
    providers: dict[str, Callable[[], object]],
    *,
    error: Callable[[object], float],
    tolerance: float,
    rounds: int,
    device: str,
    floor: float | None = None,
    prepare: dict[str, Callable[[], object]] | None = None,
) -> list[dict]:
    """Return the rows of one case: check every provider, measure its peak memory, then time all in turn.

    Args:
        bench: Name of the bench.
        case: Name of the case, with its sizes: "A2048 V32000 both".
        providers: Provider name to a call without arguments.
        error: Distance of a call's output from the fp64 result.
        tolerance: Largest error; a provider above it is not timed.
        rounds: Timed calls of each provider.
        device: "cpu" or "cuda".
        floor: Milliseconds that no implementation can beat (memory traffic or arithmetic), or None.
        prepare: Provider name to a call before each of its calls, which is not timed.

    Raises:
        SystemExit: A provider's error is above the tolerance.
    """
    errors, peaks = {}, {}

    def prepare_call(name):
        if prepare and name in prepare:
            prepare[name]()

    for name, run in providers.items():
        prepare_call(name)
        run()  # compiles and fills caches
        prepare_call(name)
        peaks[name] = cuda_peak_bytes(run) if device == "cuda" else cpu_peak_bytes(run)
        prepare_call(name)
        errors[name] = error(run())
        if not errors[name] <= tolerance:
            raise SystemExit(
                f"{bench} {case}: {name} is off by {errors[name]:.3g}, more than {tolerance:.3g}; not timed"
            )
    times: dict[str, list[float]] = {name: [] for name in providers}
    begin = time.perf_counter()
    for done in range(rounds):
        if device == "cuda" and done >= ROUNDS_MIN and time.perf_counter() - begin > CASE_SECONDS:
            break
        for name, run in providers.items():
            prepare_call(name)
            times[name].append(_milliseconds(run, device))
    rows = []
    for name, samples in times.items():
        low, middle, high = _quantiles(samples)
        rows.append(
            {
                "bench": bench,
                "case": case,
                "provider": name,
                "metric": "time",
                "unit": "ms",
                "median": middle,
                "p20": low,
                "p80": high,
                "runs": len(samples),
                "error_vs_fp64": errors[name],
                "peak_bytes": peaks[name],
                "floor": floor,
                **_machine(device),
            }
        )
        above = f"  {middle / floor:.2f}x floor" if floor else ""
        if device == "cuda" and (bench, case) in TARGETS:
            above += f", target <= {TARGETS[bench, case]} ms"
        size = f"  {peaks[name] / 2**20:9.1f} MiB" if peaks[name] is not None else ""
        times_text = f"{middle:10.3f} ms  [{low:.3f}, {high:.3f}]{size}"
        print(f"{case:36s} {name:22s} {times_text}  error {errors[name]:.1e}{above}", flush=True)
    return rows


def write(bench: str, rows: list[dict], options: argparse.Namespace) -> Path:
    """Write <out>/<device>/<bench>.json and .csv, and return the path of the first."""
    folder = folder_of(options)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.json"
    path.write_text(json.dumps([{key: row[key] for key in KEYS} for row in rows], indent=1) + "\n")
    with (folder / f"{bench}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, KEYS)
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {path}")
    return path


def folder_of(options: argparse.Namespace) -> Path:
    """Return the folder of a device's results."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return options.out / re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def _milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The writes evict the inputs from the cache, and keep the device busy until the host has launched the call:
        # else the time of a kernel of microseconds would be that of its launch from Python.
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        for _ in range(2):
            flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def _quantiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def cuda_peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of torch's CUDA allocator during a call, in bytes above the level before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of torch's CPU allocator during a call, in bytes above the level before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        allocated += record.nbytes()
        peak = max(peak, allocated)
    return peak


def _machine(device: str) -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "machine": _machine_words(device),
        "driver": _driver(device),
        "versions": json.dumps(versions),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _machine_words(device: str) -> str:
    """Return the processor and the cores that this process may use; on a GPU, the GPU and its memory before them."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    words = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    if device != "cuda":
        return words
    memory = torch.cuda.get_device_properties(0).total_memory
    return f"{torch.cuda.get_device_name()}, {memory / 2**30:.0f} GiB; {words}"


def _driver(device: str) -> str | None:
    if device != "cuda":
        return None
    return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _commit() -> str | None:
    """Return the commit that is measured, with "-dirty" if files other than results differ from it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--", ".", ":!bench/results"])
    return f"{commit}-dirty" if commit and changed else commit


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
