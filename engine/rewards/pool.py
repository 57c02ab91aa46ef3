"""Worker processes that reward functions run in, seen from the process that trains."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from multiprocessing.connection import Connection, Pipe

from icegrt.errors import ConfigError
from icegrt.rewards.error_policy import Call, timed_out
from icegrt.rewards.function import CallError
from icegrt.rewards.sample import Sample, ScoreOrFailure

# Imports take their time on a busy machine, however short a call may be.
SHORTEST_LOAD_LIMIT_S = 60.0
# The path is handed over as it is now: what this process can import, the worker can.
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from icegrt.rewards.worker import serve
serve(int(sys.argv[1]))
"""


class Worker:
    """One process with one function. A call that takes too long, or kills it, costs this process and not the run."""

    def __init__(self, spec: str, style: str, label_key: str, key: str, timeout_seconds: float) -> None:
        self.spec, self.key, self.timeout_seconds = spec, key, timeout_seconds
        self.name = spec.rpartition(":")[2]
        self._load = ("load", spec, style, label_key, key)
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._cancelled = False

    def start(self) -> None:
        """Start the process and load the function. Raises `ConfigError` if it cannot be loaded."""
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # ended together with the processes that the function starts
            )
        self._connection = ours
        try:
            ours.send(self._load)
            limit = self.timeout_seconds and max(self.timeout_seconds, SHORTEST_LOAD_LIMIT_S)
            if not ours.poll(limit or None):
                raise ConfigError(f"{self.key}: loading {self.spec} took longer than {limit:g} s")
            answer, message = ours.recv()
        except (EOFError, OSError):
            raise ConfigError(f"{self.key}: loading {self.spec} ended its process ({self._end()})") from None
        except BaseException:
            self.stop()
            raise
        if answer == "refused":
            self.stop()
            raise ConfigError(message)

    def score(self, samples: list[Sample]) -> list[ScoreOrFailure]:
        """What the function says of the samples. Raises `CallError`; after a time-out or a death the next call has a
        new process."""
        if self._process is None and not self._cancelled:
            self.start()
        if self._cancelled:  # perhaps while it started, when there was no process to end yet
            self.stop()
            raise CallError("cancelled", f"reward function `{self.name}` was not called: another call had failed")
        first = f"{len(samples)} samples, the first of which is {samples[0].where}"
        try:
            request = pickle.dumps(("grade", samples))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise CallError(
                "raised", f"{first} cannot be sent to a worker process ({what}); set ppo.reward.workers=0"
            ) from error
        try:
            self._connection.send_bytes(request)
            if not self._connection.poll(self.timeout_seconds or None):
                self.stop()
                raise CallError("timeout", timed_out(self.name, self.timeout_seconds, samples))
            answer, result = self._connection.recv()
        except (EOFError, OSError):
            how = self._end()
            raise CallError("died", f"reward function `{self.name}` ended its process ({how}) on {first}") from None
        except BaseException:
            self.stop()
            raise
        if answer == "failed":
            raise result
        return result

    def cancel(self) -> None:
        """From another thread: end what is being graded, and refuse to grade until `stop`."""
        self._cancelled = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process and those that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _end(self) -> str:
        process = self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        self.stop()
        if code is None:
            return "it closed its pipe"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


class WorkerPool:
    """Workers with the same function, which share out the responses; those to one prompt stay together."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(len(workers), "reward")

    def start(self) -> None:
        """Start the first worker, so that what cannot be loaded is refused now; the others start when needed."""
        self.workers[0].start()

    def shares(self, samples: list[Sample]) -> list[list[Sample]]:
        """The samples, in order, cut between prompts into at most one even share per worker."""
        groups = [list(members) for _, members in groupby(samples, key=lambda s: s.group)]
        count = min(len(self.workers), len(groups))
        parts = [groups[len(groups) * i // count : len(groups) * (i + 1) // count] for i in range(count)]
        return [[sample for group in part for sample in group] for part in parts]

    def score(
        self, samples: list[Sample], how: Callable[[Call, list[Sample]], list[ScoreOrFailure]]
    ) -> list[ScoreOrFailure]:
        """`how(worker.grade, share)` for every worker at once, the results in the samples' order."""
        shares = self.shares(samples)
        futures = [
            self._threads.submit(how, worker.score, share)
            for worker, share in zip(self.workers[: len(shares)], shares, strict=True)
        ]
        try:
            return [result for future in futures for result in future.result()]
        except BaseException:
            for worker in self.workers:  # the other shares are of no use any more
                worker.cancel()
            raise

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.stop()
