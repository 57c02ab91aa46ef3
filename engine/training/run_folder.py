"""The folder of a run and the output file of a command: locked and checked before work begins, removed if unused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.checkpoint.directory import list_checkpoints, recover
from icegrt.config import CONFIG_FILE
from icegrt.errors import RunError
from icegrt.utils.console import is_main, warn
from icegrt.utils.files import JsonlWriter, make_folders, remove_empty_folders

LOCK_TIMEOUT_S = 5.0


@dataclass
class RunLock:
    """This process's lock on a run's folder.

    Attributes:
        is_resume: whether a run has used the folder before.
        new_folders: folders created for this run, deepest first.
        handle: file descriptor that holds the lock; None on a file system without locks.
    """

    is_resume: bool
    new_folders: list[Path]
    handle: int | None

    def release(self) -> None:
        """Release the lock, and remove new folders that are still empty."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
        remove_empty_folders(self.new_folders)
        self.new_folders = []


def lock_run_folder(config: Any) -> RunLock:
    """Create and lock the folder of a run, or lock an existing one as `run.resume` allows.

    Raises:
        RunError: the folder belongs to something else, cannot be written, or is locked by another process.
    """
    folder = Path(os.path.abspath(config.run.dir))
    if folder.is_file():
        raise RunError(f"{folder}: not a folder; set {config.section}.run.dir to another place")
    run_lock = RunLock(False, create_writable_folder(folder), None)
    try:
        run_lock.handle = _lock(folder)
        run_lock.is_resume = _check_contents(config, folder)
    except BaseException:
        run_lock.release()
        raise
    return run_lock


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock until it is closed; None on a file system without locks."""
    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:  # the other process may be about to exit
            if time.monotonic() > deadline:
                os.close(handle)
                raise RunError(
                    f"{folder}: another process is running in it; end that one, or a rank that was left over"
                ) from None
            time.sleep(0.1)
        except OSError:
            os.close(handle)
            return None


def _check_contents(config: Any, folder: Path) -> bool:
    """Return whether there is a run to resume. Raises `RunError` if this run must not use the folder."""
    key = f"{config.section}.run.dir"
    try:
        # torchrun restarts a failed run with the same command, without --resume; the folder then holds this run.
        is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        resume = config.run.resume or ("auto" if is_restart else False)
        if resume:
            recover(folder)
        checkpoints = list_checkpoints(folder)
        names = [p.name for p in folder.iterdir()]
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror or error})") from None
    if resume is True and not checkpoints:
        start = f"start again with {config.section}.run.resume=auto" if names else "start without --resume"
        raise RunError(f"{folder}: no checkpoint to resume from; {start}")
    if not resume and not checkpoints and CONFIG_FILE in names:
        raise RunError(
            f"{folder}: holds a run that ended before its first checkpoint; start it again with "
            f"{config.section}.run.resume=auto, or set {key} to another folder"
        )
    if not resume and names:
        raise RunError(f"{folder}: not empty; continue that run with --resume, or set {key} to another folder")
    # A run that was killed before its first checkpoint has left its configuration, or nothing but hidden files.
    if resume and not checkpoints and CONFIG_FILE not in names and any(not name.startswith(".") for name in names):
        raise RunError(f"{folder}: not empty, and not the folder of a run; set {key} to another folder")
    return bool(resume and names)


def create_writable_folder(folder: Path) -> list[Path]:
    """Create `folder` with its parents, and write a byte to test it. Returns the new folders, deepest first.

    Raises:
        RunError: it cannot be written. New folders are removed.
    """
    new_folders: list[Path] = []
    try:
        new_folders = make_folders(folder)
        # Root may write against the mode bits, and a full or read-only disk fails at the first write only.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        remove_empty_folders(new_folders)
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return new_folders


@contextlib.contextmanager
def rows_file(out: str, inputs: Sequence[str] = ()) -> Iterator[JsonlWriter | None]:
    """Yield a writer for a JSONL file on rank 0, and None on other ranks.

    If the block raises, neither the file nor its new folders remain.

    Args:
        out: the file to write.
        inputs: files that the command reads; `out` must be none of them.

    Raises:
        RunError: `out` is an input or a folder, cannot be written, or another process is writing it.
    """
    if not is_main():
        yield None
        return
    path = Path(out)
    if path.is_dir():
        raise RunError(f"{path}: is a folder; name a JSONL file to write")
    if path.exists():
        if any(os.path.exists(read) and os.path.samefile(path, read) for read in inputs):
            raise RunError(f"{path}: this command reads it and would replace it; name another file to write")
        warn(f"{path}: is there already; it is replaced when all rows are written")
    new_folders = create_writable_folder(path.parent)
    try:
        with JsonlWriter(path) as writer:
            yield writer
    except BaseException:
        remove_empty_folders(new_folders)
        raise
