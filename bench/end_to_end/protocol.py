"""A worker runs iterations in a process of its own, one for each line it receives. Its caller times workers in turn.

A worker prints one line `{"ready": ..., "settings": ...}` after its warm-up, and one line of figures per iteration.
Everything else that its libraries print goes to the standard error. An iteration that counts operations is slower and
is not timed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
STEP, COUNT = "step", "count"
# Variable that names the folder of the run to all of its ranks.
RUN_FOLDER = "ICEGRT_BENCH_FOLDER"


class WorkerError(RuntimeError):
    """A worker ended before its answer."""


def private_stdout() -> TextIO:
    """Return the standard output for figures alone; what others print goes to the standard error from now on."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def try_settings(settings: Sequence[str], run: Callable[[str], dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of all phases of one iteration at each setting.

    An iteration at the first setting comes before them and is left out.

    Args:
        settings: their names.
        run: runs an iteration at a setting and returns its figures.
    """
    run(settings[0])
    return {setting: sum(run(setting)["phases"].values()) for setting in settings}


def serve(
    step: Callable[[], dict[str, Any]],
    out: TextIO,
    count: Callable[[], dict[str, Any]] | None = None,
    settings: dict[str, float] | None = None,
) -> None:
    """Warm up with one iteration, then run one for each line `step` or `count` of the standard input.

    Args:
        step: runs an iteration and returns its figures, such as `phases`.
        out: of `private_stdout`.
        count: runs an iteration and returns its operations by phase (`flops`), tokens and padding. None: not counted.
        settings: seconds at each setting that was tried, which was the warm-up; `step` runs at the fastest.
    """
    if settings is None:
        step()
    else:
        reset_peak_bytes()  # settings that were tried may have taken more
    print(json.dumps({"ready": peak_bytes(), "settings": settings or {}}), file=out)
    for line in sys.stdin:
        if line.strip() == COUNT:
            print(json.dumps(count() if count is not None else {}), file=out)
            continue
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
    """Return the peak of this process's resident memory since it began, or since `reset_peak_bytes`."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        # `ru_maxrss` would also have the memory of the process that started this one.
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_bytes() -> None:
    """Let the peak begin at the memory of now. On Linux; elsewhere the peak stays that of the whole process."""
    gc.collect()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Worker:
    """A worker process, started but not waited for.

    Args:
        name: for messages.
        python: interpreter of its environment.
        module: to run, as `python -m` takes it.
        arguments: of the module.
        threads: of torch.
        log: file that its standard error is added to.
        environment: further variables.
    """

    def __init__(
        self,
        name: str,
        python: str,
        module: str,
        arguments: list[str],
        threads: int,
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)} | (environment or {})
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", "-m", module, *arguments],
                cwd=ROOT,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def wait_until_ready(self) -> dict[str, float]:
        """Wait for the end of the warm-up. Raises `WorkerError` if the process ends.

        Returns:
            Seconds at each setting that the worker tried; it runs at the fastest.
        """
        settings: dict[str, float] = self.receive()["settings"]
        return settings

    def step(self) -> dict[str, Any]:
        """Run one iteration and return its figures. Raises `WorkerError` if the process ends."""
        self.send(STEP)
        return self.receive()

    def count(self) -> dict[str, Any]:
        """Run one iteration that counts operations and return them. Raises `WorkerError` if the process ends."""
        self.send(COUNT)
        return self.receive()

    def end_input(self) -> None:
        """Let the process end after its iteration."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """End the process."""
        self.end_input()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def send(self, command: str) -> None:
        """Request STEP or COUNT without waiting for the figures."""
        assert self._process.stdin is not None
        try:
            print(command, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerError(f"{self.name} ended with status {self._process.wait()}") from None

    def receive(self) -> dict[str, Any]:
        """Return the figures of the request before. Raises `WorkerError` if the process ends."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} ended with status {self._process.wait()}")
        figures: dict[str, Any] = json.loads(line)
        return figures
