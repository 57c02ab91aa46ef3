"""SIGTERM as a request: it is recorded, and the trainer checks for it between steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def capture_sigterm() -> Iterator[Callable[[], bool]]:
    """Record SIGTERM while the block runs. Yields a function that returns whether the signal has arrived.

    Outside of the main thread signal handlers stay unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
