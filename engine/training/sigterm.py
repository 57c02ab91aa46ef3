"""SIGTERM as a wish: it is noted, and the trainer looks for it between steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def capture_sigterm() -> Iterator[Callable[[], bool]]:
    """While the block runs SIGTERM ends nothing; gives the function that says whether one has come.

    Outside of the main thread signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
