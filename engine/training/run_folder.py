"""Places that a stage writes to: claimed before work begins, and left as they were found where it never does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.checkpoint.directory import list_checkpoints, recover
from icegrt.errors import RunError
from icegrt.utils.console import is_main
from icegrt.utils.files import JsonlWriter

CONFIG_FILE = "config.yaml"
LOCK_TIMEOUT_S = 5.0


@dataclass
class RunLock:
    """A run's folder, for as long as this process holds it. `is_resume`: a run has used it already."""

    is_resume: bool
    made: list[Path]
    lock: int | None

    def release(self) -> None:
        """Let others have it; what was made for a run that never began is removed."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
        remove_empty(self.made)
        self.made = []


def lock_run_folder(config: Any) -> RunLock:
    """Make the folder of a run, or take it up again as `run.resume` says.

    Raises `RunError` where the folder is not this run's to use, or where another process is using it.
    """
    folder = Path(config.run.dir)
    if folder.is_file():
        raise RunError(f"{folder}: not a folder; set {config.section}.run.dir to another place")
    claim = RunLock(False, claim_folder(folder), None)
    try:
        claim.lock = _lock(folder)
        claim.is_resume = _may_use(config, folder)
    except BaseException:
        claim.release()
        raise
    return claim


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder's lock until it is closed; None on a disk without locks."""
    handle = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:  # by a process that is about to die, maybe
            if time.monotonic() > end:
                os.close(handle)
                raise RunError(
                    f"{folder}: another process is running in it; end that one, or a rank that was left over"
                ) from None
            time.sleep(0.1)
        except OSError:
            os.close(handle)
            return None


def _may_use(config: Any, folder: Path) -> bool:
    """Whether there is a run to go on with. Raises `RunError` where the folder must be left as it is."""
    key = f"{config.section}.run.dir"
    try:
        # Launched once more after a failure: the command is as it was, but the folder is in use now, by this run.
        is_resume = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        resume = config.run.resume or ("auto" if is_resume else False)
        if resume:
            recover(folder)
        found = list_checkpoints(folder)
        names = [p.name for p in folder.iterdir()]
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror or error})") from None
    if resume is True and not found:
        raise RunError(f"{folder}: no checkpoint to resume from; start without --resume")
    if not resume and names:
        raise RunError(f"{folder}: not empty; continue that run with --resume, or set {key} to another folder")
    # Killed before its first checkpoint, a run has written its configuration, or was about to.
    if resume and not found and CONFIG_FILE not in names and any(not name.startswith(".") for name in names):
        raise RunError(f"{folder}: not empty, and not the folder of a run; set {key} to another folder")
    return bool(resume and names)


def claim_folder(folder: Path) -> list[Path]:
    """Make `folder` with its parents and try it. Returns what had to be made, deepest first.

    Raises `RunError` where it cannot be written; what was made until then is gone again.
    """
    made: list[Path] = []
    try:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
        # Root may write where the mode says no, and a full or read-only disk says nothing until asked.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        remove_empty(made)
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove these folders, deepest first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def rows_file(out: str) -> Iterator[JsonlWriter | None]:
    """A JSONL file that is there whole or, where the block raises, not at all, its new folders neither.

    Rank 0 writes it; the others are given None.
    """
    if not is_main():
        yield None
        return
    path = Path(out)
    if path.is_dir():
        raise RunError(f"{path}: is a folder; name a JSONL file to write")
    made = claim_folder(path.parent)
    try:
        with JsonlWriter(path) as writer:
            yield writer
    except BaseException:
        remove_empty(made)
        raise
