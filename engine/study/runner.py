"""Run the tasks of a study side by side, each in a process group of its own, and record how each ended.

A task that ended has a `record.json` and is not run again. A task without one was interrupted, and starts again or
continues. All processes hold the lock of the study's folder: after a kill of the study no second one starts while a
run is left over. On Linux the kernel sends SIGTERM to the runs of a killed study.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.errors import RunError
from icegrt.study.frozen import now, write_json
from icegrt.study.grid import Task
from icegrt.utils import console
from icegrt.utils.files import read_object
from icegrt.utils.text import duration

__all__ = ["LOG_FILE", "RECORD_FILE", "Limits", "lock_study", "read_record", "run_tasks"]

LOG_FILE, RECORD_FILE, START_FILE, LOCK_FILE = "log.txt", "record.json", "started.json", ".lock"
GRACE_S = 60.0  # between SIGTERM, after which a training run writes a checkpoint, and SIGKILL
LOCK_TIMEOUT_S = 30.0
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the tasks may use.

    Attributes:
        places: ranks at a time.
        threads: threads of each rank.
        seconds: longest time of a task; 0: no limit.
        grace_seconds: from SIGTERM to SIGKILL.
    """

    places: int
    threads: int = 1
    seconds: float = 0.0
    grace_seconds: float = GRACE_S


@contextlib.contextmanager
def lock_study(folder: Path, timeout_seconds: float = LOCK_TIMEOUT_S) -> Iterator[int]:
    """Create and lock the folder of a study. Yields the descriptor of the lock, which the runs inherit.

    Raises:
        RunError: the folder cannot be written, or another study or a run of it holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error}); set study.dir elsewhere") from None
    try:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{folder}: another `icegrt study`, or a run that it started, is going on in it; end that one"
                    ) from None
                time.sleep(POLL_S)
            except OSError:  # a file system without locks
                break
        yield descriptor
    finally:
        os.close(descriptor)


def read_record(task: Task) -> dict[str, Any] | None:
    """Return how the task ended; None if it has not, or if it ended with another fingerprint."""
    path = task.folder / RECORD_FILE
    if not path.is_file():
        return None
    record = read_object(path)
    return record if record["fingerprint"] == task.fingerprint else None


def run_tasks(
    tasks: Sequence[Task],
    limits: Limits,
    lock: int,
    *,
    label: str,
    versions: Mapping[str, str] | None = None,
    problem_of: Callable[[Task], str] = lambda task: "",
    retry_failed: bool = False,
) -> None:
    """Run every task that has not ended, as many at a time as the limits allow, in order.

    Ctrl-C, SIGTERM and any error stop the tasks that are running; the same call continues later.

    Args:
        tasks: the tasks.
        limits: what they may use.
        lock: descriptor that each process inherits.
        label: of the progress.
        versions: for the records.
        problem_of: returns why a task that exited with status 0 has failed all the same, or an empty text.
        retry_failed: run failed tasks again.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    waiting = []
    for task in tasks:
        record = read_record(task)
        if record is None or (retry_failed and record["status"] == "failed"):
            waiting.append(task)
    if not waiting:
        return
    running: list[_Process] = []
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with console.progress(len(waiting), label, "runs") as bar:
            while waiting or running:
                # 1. Start what fits. A task of more ranks than there are places runs alone.
                while waiting and (
                    not running or sum(p.task.ranks for p in running) + waiting[0].ranks <= limits.places
                ):
                    running.append(_Process(waiting.pop(0), limits, lock))
                time.sleep(POLL_S)
                # 2. Record what ended.
                for process in [p for p in running if p.has_ended()]:
                    running.remove(process)
                    record = process.record(problem_of, versions or {})
                    if record["status"] == "failed":
                        log = process.task.folder / LOG_FILE
                        console.warn(f"{process.task.name} failed: {record['reason']} ({log})")
                    bar.advance(last=process.task.name)
    finally:
        _stop(running, limits.grace_seconds)
        signal.signal(signal.SIGTERM, previous)


class _Process:
    """A task that is running."""

    def __init__(self, task: Task, limits: Limits, lock: int) -> None:
        self.task, self._limits = task, limits
        self._resumed = self._make_folder()
        with open(task.folder / LOG_FILE, "ab" if self._resumed else "wb") as log:
            try:
                self._popen: subprocess.Popen | None = subprocess.Popen(
                    task.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(task, limits.threads),
                    start_new_session=True,  # a signal reaches the group; Ctrl-C comes through `_stop`
                    pass_fds=(lock,),
                    preexec_fn=_sigterm_when_parent_dies if sys.platform == "linux" else None,
                )
            except OSError as error:
                log.write(f"{task.command[0]}: {error.strerror or error}\n".encode())
                self._popen = None
        self._started = time.monotonic()
        self._stopped_at: float | None = None

    def _make_folder(self) -> bool:
        """Create the folder of the task, or clear it. Return whether the task continues an interrupted one.

        A run that ended with another fingerprint is moved aside: an amended study runs it again.
        """
        task = self.task
        record, started = task.folder / RECORD_FILE, task.folder / START_FILE
        if record.is_file() and read_object(record)["fingerprint"] != task.fingerprint:
            number = 1
            while (target := task.folder.with_name(f"{task.folder.name}.earlier_{number}")).exists():
                number += 1
            task.folder.rename(target)
        ended = record.is_file()  # a failed run, which is retried from its beginning
        resumed = task.keeps_partial and not ended and task.out.is_dir() and started.is_file()
        resumed = resumed and read_object(started)["fingerprint"] == task.fingerprint
        if not resumed:
            shutil.rmtree(task.out, ignore_errors=True)
        task.out.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        write_json(started, {"fingerprint": task.fingerprint, "started_at": now()})
        return resumed

    def has_ended(self) -> bool:
        """Return whether the process has ended. Stop it if its time is over."""
        if self._popen is None or self._popen.poll() is not None:
            return True
        elapsed = time.monotonic() - self._started
        if self._stopped_at is None and 0 < self._limits.seconds < elapsed:
            self._stopped_at = time.monotonic()
            self.signal(signal.SIGTERM)
        elif self._stopped_at is not None and time.monotonic() - self._stopped_at > self._limits.grace_seconds:
            self.signal(signal.SIGKILL)
        return False

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the task."""
        if self._popen is not None and self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, number)

    def wait(self, seconds: float) -> None:
        """Wait for the end, and kill all processes of the task if it takes longer."""
        if self._popen is None:
            return
        try:
            self._popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._popen.wait()

    def record(self, problem_of: Callable[[Task], str], versions: Mapping[str, str]) -> dict[str, Any]:
        """Write how the task ended, and return it."""
        seconds = time.monotonic() - self._started
        reason = self._reason() or problem_of(self.task)
        record = {
            "status": "failed" if reason else "finished",
            "reason": reason,
            "seconds": round(seconds, 3),
            "ended_at": now(),
            "resumed": self._resumed,
            "fingerprint": self.task.fingerprint,
            "command": list(self.task.command),
            "versions": dict(versions),
            "log_tail": _last_lines(self.task.folder / LOG_FILE) if reason else [],
        }
        write_json(self.task.folder / RECORD_FILE, record)
        return record

    def _reason(self) -> str:
        if self._popen is None:
            return "the command cannot be started"
        if self._stopped_at is not None:
            return f"it took longer than {duration(self._limits.seconds)} and was stopped"
        status = self._popen.returncode
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        return f"it ended with exit status {status}" if status else ""


def _environment(task: Task, threads: int) -> dict[str, str]:
    """Return the environment of a task: without the ranks of this process, and with the threads of each rank.

    A script that would start one rank per core sees that it is rank 0 of one.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} if task.ranks == 1 else {}
    return inherited | one | {"OMP_NUM_THREADS": str(threads)}


def _sigterm_when_parent_dies() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(processes: Sequence[_Process], grace_seconds: float) -> None:
    """End processes: SIGTERM to all, and SIGKILL to those that are left after the grace."""
    for process in processes:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        process.wait(deadline - time.monotonic())


def _last_lines(path: Path, count: int = 5) -> list[str]:
    text = path.read_bytes()[-4000:].decode("utf-8", "replace")
    return [console.plain(line)[:300] for line in text.splitlines() if line.strip()][-count:]
