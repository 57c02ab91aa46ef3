"""Write the responses of iterations beside the training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from icegrt.utils.console import warn
from icegrt.utils.files import JsonlWriter

_MOST_WAITING = 2  # iterations in memory beside the one that is written


class RolloutWriter:
    """A thread that writes files of rows, one after another. `submit` waits if two files wait already.

    A file that cannot be written is a warning, the first time: the run does not need it.
    """

    def __init__(self) -> None:
        self._files: queue.Queue[tuple[Path, Iterable[dict[str, Any]]] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._has_warned = False

    def submit(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Queue a file; `rows` are formed in the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
            self._thread.start()
        self._files.put((path, rows))

    def flush(self) -> None:
        """Wait until every file is on the disk."""
        self._files.join()

    def close(self) -> None:
        """Write what is queued and end the thread. Closing twice does nothing."""
        if self._thread is not None:
            self._files.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (item := self._files.get()) is not None:
            try:
                self._write(*item)
            finally:
                self._files.task_done()
        self._files.task_done()

    def _write(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        try:
            with JsonlWriter(path) as writer:
                for row in rows:
                    writer.write(row)
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                reason = error.strerror or error if isinstance(error, OSError) else error
                warn(f"{path}: not written ({reason}); the run goes on, make room on the disk")
