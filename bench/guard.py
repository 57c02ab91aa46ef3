"""Run quick benches and compare their quotients with the committed ones; status 1 if icegrt has fallen behind.

A quotient says how many times as fast icegrt is as an alternative in the same run, with providers in turn, so it
depends less on the machine and on what else it does than a time. It is worse if it is more than 15% below the committed
one and its interval lies below the committed interval. A bench with a worse quotient runs again: only what is worse
both times fails. Status 1 also comes from a bench that fails and from one that has committed rows but none in common.

python -m bench.guard                                    # the quick benches
python -m bench.guard --benches rollout --full           # others, by name
python -m bench.guard --rows /tmp/out/cpu                # rows that are there already; runs nothing
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from bench.rows import RESULTS, Comparison, Row, compared, load, quotient_text, versions

ROOT = Path(__file__).resolve().parents[1]
# Benches of operations that icegrt has a kernel of its own for, on a CPU too.
QUICK = ("decode_linear", "linear_ppo_loss", "paged_attention", "rope_write_kv", "sample_tokens", "shaped_gae")
TOLERANCE = 0.15
WORSE, BETTER, OK, NEW, MISSING = "worse", "better", "ok", "new", "missing"


@dataclass(frozen=True)
class Finding:
    """A quotient now and as committed; one of them is None for what is new or missing."""

    committed: Comparison | None
    now: Comparison | None
    tolerance: float

    @property
    def key(self) -> tuple[str, str, str]:
        """Case, metric and alternative."""
        found = self.now or self.committed
        assert found is not None
        return found.key

    @property
    def verdict(self) -> str:
        """`worse`, `better`, `ok`, `new` (not committed) or `missing` (its case ran without the alternative)."""
        if self.committed is None:
            return NEW
        if self.now is None:
            return MISSING
        before, after = self.committed, self.now
        if after.quotient < (1 - self.tolerance) * before.quotient and after.interval[1] < before.interval[0]:
            return WORSE
        if after.quotient > (1 + self.tolerance) * before.quotient and after.interval[0] > before.interval[1]:
            return BETTER
        return OK


def compare(committed: Sequence[Row], now: Sequence[Row], tolerance: float = TOLERANCE) -> list[Finding]:
    """Return a finding per case, metric and alternative of the cases that ran now; other committed cases are left out.

    Args:
        committed: rows of a bench as committed.
        now: rows of the same bench, of this run.
        tolerance: share of a quotient that may be lost.
    """
    before = {comparison.key: comparison for comparison in compared(committed)}
    after = {comparison.key: comparison for comparison in compared(now)}
    ran = {(row["case"], row["metric"]) for row in now}
    keys = dict.fromkeys([*after, *(key for key in before if key[:2] in ran)])
    return [Finding(before.get(key), after.get(key), tolerance) for key in keys]


def problems(findings: Mapping[str, Sequence[Finding]], committed: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return why the guard fails, one line each; nothing if it passes."""
    lines = []
    for bench, found in findings.items():
        worse = [finding for finding in found if finding.verdict == WORSE]
        lines += [f"{bench}: {', '.join(finding.key)} is worse than committed" for finding in worse]
        if bench in committed and not any(finding.committed and finding.now for finding in found):
            lines.append(f"{bench}: no case and alternative of this run is in the committed rows")
    return lines


def print_table(findings: Mapping[str, Sequence[Finding]]) -> None:
    """Print all findings, with both quotients and their change."""
    names = {id(f): f"{bench}: {', '.join(f.key)}" for bench, found in findings.items() for f in found}
    width = max(map(len, names.values()), default=0)
    for found in findings.values():
        for finding in found:
            texts = ["-" if each is None else quotient_text(each) for each in (finding.committed, finding.now)]
            change = ""
            if finding.committed and finding.now:
                change = f"{100 * (finding.now.quotient / finding.committed.quotient - 1):+.0f}%"
            print(f"{names[id(finding)]:{width}s}  {texts[0]:>24s}  {texts[1]:>24s}  {change:>6s}  {finding.verdict}")


def modules() -> dict[str, str]:
    """Return the module of each bench by its name: that of its file without `bench_`."""
    paths = [*(ROOT / "bench").glob("*/bench_*.py"), ROOT / "bench" / "bench_ppo.py"]
    return {
        path.stem.removeprefix("bench_"): ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(paths)
    }


def measure(name: str, options: argparse.Namespace, threads: str | None) -> dict[str, list[Row]]:
    """Run a bench in a process of its own; return its rows by file name.

    Args:
        name: of the bench.
        options: those of `main`.
        threads: of torch; None: its default.

    Raises:
        RuntimeError: the bench fails or writes nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", modules()[name], "--device", options.device, "--out", folder]
        command += ["--rounds", str(options.rounds)] + ([] if options.full else ["--quick"])
        environment = os.environ | ({"OMP_NUM_THREADS": threads} if threads else {})
        output = None if options.verbose else subprocess.DEVNULL
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=output).returncode
        rows = {name: rows for path in Path(folder).iterdir() for name, rows in load(path).items()}
    if status or not rows:
        raise RuntimeError(f"{name}: ended with status {status} and {len(rows)} files of rows")
    return rows


def threads_of(name: str, committed: Mapping[str, Sequence[Row]]) -> str | None:
    """Return the threads of a bench's committed rows: another number has other quotients."""
    found = (rows[0] for file, rows in committed.items() if name in (file, rows[0]["bench"]))
    return next((versions(row).get("threads") for row in found), None)


def run(options: argparse.Namespace, committed: Mapping[str, Sequence[Row]]) -> tuple[dict, list[str]]:
    """Run the benches, those with a worse quotient twice; return findings by file, and what failed."""
    findings: dict[str, list[Finding]] = {}
    failures = []
    for name in options.benches:
        try:
            for attempt in (1, 2):
                print(f"{name}, run {attempt}", flush=True)
                rows = measure(name, options, threads_of(name, committed))
                found = {file: compare(committed.get(file, ()), rows[file], options.tolerance) for file in rows}
                findings |= {file: better_of(findings.get(file, ()), found[file]) for file in found}
                if not any(finding.verdict == WORSE for file in found for finding in findings[file]):
                    break
        except RuntimeError as error:
            failures.append(str(error))
    return findings, failures


def better_of(first: Sequence[Finding], second: Sequence[Finding]) -> list[Finding]:
    """Return the findings of a second run, but those of the first where they were not worse."""
    before = {finding.key: finding for finding in first}
    return [f if f.key not in before or before[f.key].verdict == WORSE else before[f.key] for f in second]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the guard; return its status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(sorted(modules()))
    parser.add_argument(
        "--benches", nargs="+", choices=sorted(modules()), default=list(QUICK), metavar="NAME", help=f"of {names}"
    )
    parser.add_argument("--full", action="store_true", help="all cases instead of the quick ones; rollout needs it")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of a case (default: 15)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="share of a quotient that may be lost (default: 0.15)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of committed rows by device")
    parser.add_argument("--rows", type=Path, help="a device's folder of rows to compare, instead of running benches")
    parser.add_argument("--verbose", action="store_true", help="print what the benches print")
    options = parser.parse_args(arguments)
    if options.rows is not None:
        committed = load(options.results / options.rows.name)
        rows = load(options.rows)
        findings = {file: compare(committed.get(file, ()), rows[file], options.tolerance) for file in rows}
        lines = [] if findings else [f"{options.rows} has no rows"]
    else:
        committed = load(harness.folder_of(argparse.Namespace(device=options.device, out=options.results)))
        findings, lines = run(options, committed)
    print_table(findings)
    lines += problems(findings, committed)
    print(*lines or ["no quotient is worse"], sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
