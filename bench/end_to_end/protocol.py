"""A worker runs iterations in a process of its own, one for each line it receives. Its caller times workers in turn.

A worker prints one line `{"ready": ...}` after its warm-up, and one line of figures per iteration. Everything else that
its libraries print goes to the standard error.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
STEP = "step"


class WorkerError(RuntimeError):
    """A worker ended before its answer."""


def private_stdout() -> TextIO:
    """Return the standard output for figures alone; what others print goes to the standard error from now on."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def serve(step: Callable[[], dict[str, Any]], out: TextIO) -> None:
    """Warm up with one iteration, then run one for each line `step` of the standard input.

    Args:
        step: runs an iteration and returns its figures, such as `phases`.
        out: of `private_stdout`.
    """
    step()
    print(json.dumps({"ready": peak_bytes()}), file=out)
    for line in sys.stdin:
        if line.strip() != STEP:
            break
        begin, cpu = time.perf_counter(), time.process_time()
        figures = step()
        figures |= {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(figures), file=out)


def peak_bytes() -> int:
    """Return the peak of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """A worker process, started but not waited for.

    Args:
        name: for messages.
        python: interpreter of its environment.
        module: to run, as `python -m` takes it.
        arguments: of the module.
        threads: of torch.
        log: file that its standard error is added to.
    """

    def __init__(self, name: str, python: str, module: str, arguments: list[str], threads: int, log: Path) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", "-m", module, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def wait_until_ready(self) -> None:
        """Wait for the end of the warm-up. Raises `WorkerError` if the process ends."""
        self._read()

    def step(self) -> dict[str, Any]:
        """Run one iteration and return its figures. Raises `WorkerError` if the process ends."""
        assert self._process.stdin is not None
        try:
            print(STEP, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerError(f"{self.name} ended with status {self._process.wait()}") from None
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} ended with status {self._process.wait()}")
        figures: dict[str, Any] = json.loads(line)
        return figures
