"""The worker process of a reward function: it loads the function, serves calls, and ends with its parent.

It is a fresh interpreter, not a fork, which would copy the parent's locks and CUDA context. The function runs in the
main thread, where `signal.alarm` and asyncio work.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from icegrt.errors import ConfigError
from icegrt.rewards.compat import adapt
from icegrt.rewards.function import CallError, RewardFunction, load_reward_function, score
from icegrt.rewards.sample import Sample

_PARENT_CHECK_S = 1.0


def serve(descriptor: int) -> None:
    """Serve requests on the pipe `descriptor` until the parent closes its end.

    ("load", spec, style, label_key, key) -> ("loaded", None) or ("refused", message)
    ("score", samples)                    -> ("scored", results) or ("failed", CallError)
    """
    # The parent handles signals that go to all processes. Three get an empty handler instead of SIG_IGN, which the
    # programs that the function starts would inherit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: None)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    connection = Connection(descriptor)
    function: RewardFunction | None = None
    while True:
        try:
            request, *arguments = connection.recv()
        except (EOFError, OSError):
            return
        if request == "load":
            function, answer = _load(*arguments)
        else:
            answer = _score(function, *arguments)
        sys.stdout.flush()
        connection.send(answer)


def _load(spec: str, style: str, label_key: str, key: str) -> tuple[RewardFunction | None, tuple[str, Any]]:
    try:
        return adapt(load_reward_function(spec, key), style, label_key, key), ("loaded", None)
    except ConfigError as error:
        return None, ("refused", str(error))


def _score(function: RewardFunction, samples: list[Sample]) -> tuple[str, Any]:
    try:
        return "scored", score(function, samples)
    except CallError as error:
        return "failed", error


def _exit_with_parent(parent: int) -> None:
    # While a function runs, the process does not read the pipe and would not notice that its parent was killed.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)
