"""Under a limit of the operating system an offloaded run completes where a resident one does not."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# glibc keeps blocks below a threshold that grows; this one stays, so that freed storages leave the process. One arena.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
STATE = 40 * 7.6e6  # bytes: four models in fp32, gradients and Adam of two of them


def step(*arguments) -> tuple[str, int]:
    """Run a step of the script in a process of its own. Returns its outcome, and the peak in bytes."""
    # Stacks of threads count as private memory.
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.limited_memory", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (2 << 20, 2 << 20)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    peaks = [int(line.split()[1]) for line in lines if line.startswith("peak ")]
    outcomes = [line for line in lines if line.startswith(("completed", "failed:"))]
    return (outcomes or [""])[-1], (peaks or [0])[-1]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_offloaded_runs_complete_in_a_fraction_of_the_memory_of_a_resident_one(tmp_path):
    try:
        step("make", tmp_path)
        outcome, resident = step("run", tmp_path, "none", 0)
        assert outcome == "completed" and resident > STATE > 300e6
        # With all roles offloaded, and with the state of their optimizers on the host for good.
        limits = {"all": int(0.6 * resident), "host": int(0.35 * resident)}
        for choice, limit in limits.items():
            outcome, peak = step("run", tmp_path, choice, limit)
            assert outcome == "completed" and peak <= limit
        for choice, limit in (("none", limits["all"]), ("all", limits["host"])):
            outcome, _ = step("run", tmp_path, choice, limit)
            assert outcome.startswith("failed:") and "allocate" in outcome
    finally:
        shutil.rmtree(tmp_path)
