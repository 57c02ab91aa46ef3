"""Signals that ask a run to stop: the first is recorded, and the trainer checks for it between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from icegrt.utils.console import announce_stop, bars_after_stop

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Launchers forward a signal that the terminal has sent already: later ones within this time are the same request.
SAME_REQUEST_S = 1.0


@contextlib.contextmanager
def capture_stop_signals() -> Iterator[Callable[[], int]]:
    """Record the first stop signal while the block runs. Yields a function that returns its number, or 0.

    A second one leaves at once: SIGINT raises `KeyboardInterrupt`, others end the process. SIGHUP silences a terminal
    that has gone. Outside of the main thread signal handlers stay unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    first = _FirstSignal()
    # A handler that was not set from Python reads as None and cannot be restored.
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not None]
    # A run under nohup goes on after SIGHUP.
    numbers = [number for number in numbers if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, first.receive) for number in numbers}
    try:
        with bars_after_stop():
            yield lambda: first.number
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _FirstSignal:
    def __init__(self) -> None:
        self.number = 0
        self._received_at = 0.0
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(self, number: int, frame: object) -> None:
        """Record the first signal; leave at the second."""
        if number == signal.SIGHUP:
            self._silence_terminals()
        if not self.number:
            self.number, self._received_at = number, time.monotonic()
            name = signal.Signals(number).name
            announce_stop(f"{name}: saving after this step; a second one leaves at once")
        elif time.monotonic() - self._received_at > SAME_REQUEST_S:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _silence_terminals(self) -> None:
        # Writes to a terminal that has gone fail, and would end the run before it is saved.
        for descriptor in self._terminals:
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
