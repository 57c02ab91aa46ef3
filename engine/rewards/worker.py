"""The process that a reward function runs in: loads it by its file, answers calls, and ends with its parent.

Started as a fresh interpreter and not forked: a fork would take along the parent's threads, locks and CUDA context.
The function runs in the main thread, where `signal.alarm` and asyncio work.
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
    """Answer requests from the parent until it closes its end.

    ("load", spec, style, label_key, key) is answered by ("loaded", None) or ("refused", message); ("grade", samples)
    by ("graded", results) or ("failed", CallError).
    """
    # The parent decides what a signal to all processes means. SIGTERM is not ignored but unheard: an ignored one would
    # be so in every program that the function starts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
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
            answer = _grade(function, *arguments)
        sys.stdout.flush()
        connection.send(answer)


def _load(spec: str, style: str, label_key: str, key: str) -> tuple[RewardFunction | None, tuple[str, Any]]:
    try:
        return adapt(load_reward_function(spec, key), style, label_key, key), ("loaded", None)
    except ConfigError as error:
        return None, ("refused", str(error))


def _grade(function: RewardFunction, samples: list[Sample]) -> tuple[str, Any]:
    try:
        return "graded", score(function, samples)
    except CallError as error:
        return "failed", error


def _end_with(parent: int) -> None:
    # A function that never returns would outlive a parent that was killed: it reads no closed pipe.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)
