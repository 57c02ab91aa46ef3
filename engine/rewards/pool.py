"""Start, call and end the worker processes of reward functions; runs in the training process."""

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
from icegrt.rewards.error_policy import Call, timeout_message, wait_limit
from icegrt.rewards.function import CallError
from icegrt.rewards.sample import Sample, ScoreOrFailure
from icegrt.utils.console import warn

# Loading includes imports, which are slow on a busy machine even if a call is short.
MIN_LOAD_TIMEOUT_S = 60.0
# The worker gets this process's import path, so that it can import the same modules.
_WORKER_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from icegrt.rewards.worker import serve
serve(int(sys.argv[1]))
"""


class Worker:
    """One process with one function. A call that times out or crashes ends this process, not the run."""

    def __init__(self, spec: str, style: str, label_key: str, key: str, timeout_seconds: float) -> None:
        self.spec, self.key, self.timeout_seconds = spec, key, timeout_seconds
        self.name = spec.rpartition(":")[2]
        self._load_request = ("load", spec, style, label_key, key)
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._cancelled = False

    def start(self) -> None:
        """Start the process and load the function.

        Raises:
            ConfigError: the function cannot be loaded.
        """
        connection, worker_end = Pipe()
        with worker_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER_CODE, str(worker_end.fileno()), json.dumps(sys.path)],
                pass_fds=(worker_end.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # one signal ends it and the processes that the function starts
            )
        self._connection = connection
        try:
            connection.send(self._load_request)
            limit = self.timeout_seconds and max(self.timeout_seconds, MIN_LOAD_TIMEOUT_S)
            if not connection.poll(wait_limit(limit)):
                raise ConfigError(f"{self.key}: loading {self.spec} took longer than {limit:g} s")
            status, message = connection.recv()
        except (EOFError, OSError):
            raise ConfigError(f"{self.key}: loading {self.spec} ended its process ({self._exit_reason()})") from None
        except BaseException:
            self.stop()
            raise
        if status == "refused":
            self.stop()
            raise ConfigError(message)

    def score(self, samples: list[Sample]) -> list[ScoreOrFailure]:
        """Return the function's results for the samples.

        Raises:
            CallError: the call failed. After a time-out or a crash the next call starts a new process.
        """
        # 1. a running process, unless `cancel` was called, perhaps during the start
        if not self._cancelled and self._ended_between_calls():
            reason = self._exit_reason()
            warn(f"reward function `{self.name}`: its process ended between two calls ({reason}); it is restarted")
        if self._process is None and not self._cancelled:
            self.start()
        if self._cancelled:
            self.stop()
            raise CallError("cancelled", f"reward function `{self.name}` was not called: another call had failed")
        # 2. the request
        batch = f"{len(samples)} samples, the first of which is {samples[0].where}"
        try:
            request = pickle.dumps(("score", samples))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise CallError(
                "raised", f"{batch} cannot be sent to a worker process ({text}); set ppo.reward.workers=0"
            ) from error
        # 3. the answer
        try:
            self._connection.send_bytes(request)
            if not self._connection.poll(wait_limit(self.timeout_seconds)):
                self.stop()
                raise CallError("timeout", timeout_message(self.name, self.timeout_seconds, samples))
            status, result = self._connection.recv()
        except (EOFError, OSError):
            reason = self._exit_reason()
            raise CallError("died", f"reward function `{self.name}` ended its process ({reason}) on {batch}") from None
        except BaseException:
            self.stop()
            raise
        if status == "failed":
            raise result
        return result

    def _ended_between_calls(self) -> bool:
        # No request is open, so a readable pipe means that its other end is closed. The process may still be exiting.
        return self._process is not None and (self._process.poll() is not None or self._connection.poll(0))

    def cancel(self) -> None:
        """Kill the process from another thread; later calls of `score` raise."""
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

    def _exit_reason(self) -> str:
        """Stop the process, which closed its pipe, and return how it ended."""
        process = self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        self.stop()
        if code is None:
            return "it closed its pipe"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


class WorkerPool:
    """Workers with the same function. Each scores a share of the responses; those to one prompt stay together."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(len(workers), "reward")

    def start(self) -> None:
        """Start the first worker, to learn now if the function cannot be loaded; the others start on first use."""
        self.workers[0].start()

    def shares(self, samples: list[Sample]) -> list[list[Sample]]:
        """Split the samples, in order and between prompts, into at most one even share per worker."""
        groups = [list(members) for _, members in groupby(samples, key=lambda s: s.group)]
        count = min(len(self.workers), len(groups))
        group_shares = [groups[len(groups) * i // count : len(groups) * (i + 1) // count] for i in range(count)]
        return [[sample for group in share for sample in group] for share in group_shares]

    def score(
        self, samples: list[Sample], error_policy: Callable[[Call, list[Sample]], list[ScoreOrFailure]]
    ) -> list[ScoreOrFailure]:
        """Run `error_policy(worker.score, share)` on all workers at once; return the results in the samples' order."""
        shares = self.shares(samples)
        futures = [
            self._threads.submit(error_policy, worker.score, share)
            for worker, share in zip(self.workers[: len(shares)], shares, strict=True)
        ]
        try:
            return [result for future in futures for result in future.result()]
        except BaseException:
            for worker in self.workers:  # no result of the other shares is used
                worker.cancel()
            raise

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.stop()
