"""The folder of a run and the output file of a command: locked and checked before work begins, removed if unused."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.checkpoint.directory import list_checkpoints, recover
from icegrt.config import CONFIG_FILE
from icegrt.config.loader import as_dict, as_yaml
from icegrt.errors import ConfigError, RunError
from icegrt.training.overwrite import check_no_input, move_aside, move_back, recover_replaced, remove_replaced
from icegrt.utils.console import is_main, print_info, warn
from icegrt.utils.files import JsonlWriter, make_folders, remove_empty_folders

LOCK_TIMEOUT_S = 5.0


@dataclass
class RunLock:
    """This process's lock on a run's folder.

    Attributes:
        folder: the run's folder.
        is_resume: whether a run has used the folder before.
        new_folders: folders created for this run, deepest first.
        handle: file descriptor that holds the lock; None on a file system without locks.
        replaces: whether an earlier run is moved aside, to be removed when this one has begun.
    """

    folder: Path
    is_resume: bool
    new_folders: list[Path]
    handle: int | None
    replaces: bool = False

    def begin(self) -> None:
        """Remove an earlier run that this one replaces. Call it when the configuration of this run is saved."""
        if self.replaces:
            self.replaces = False
            remove_replaced(self.folder)
            print_info(f"{self.folder}: the files of the earlier run are replaced (run.overwrite)")

    def release(self) -> None:
        """Release the lock; restore a run that was moved aside for nothing, and remove new folders still empty."""
        if self.replaces:
            self.replaces = False
            move_back(self.folder)
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
        remove_empty_folders(self.new_folders)
        self.new_folders = []


def lock_run_folder(config: Any, inputs: Any = ()) -> RunLock:
    """Create and lock the folder of a run, or lock an existing one as `run.resume` and `run.overwrite` allow.

    Args:
        config: the section of the stage.
        inputs: what the run reads beside the paths of `config`; none of it may be overwritten.

    Raises:
        RunError: the folder belongs to something else, cannot be written, or is locked by another process.
    """
    folder = Path(os.path.abspath(config.run.dir))
    if config.run.overwrite and config.run.resume is True:
        raise ConfigError(
            f"{config.section}.run.overwrite and {config.section}.run.resume (or --resume) contradict each other; "
            "leave one of them out"
        )
    if folder.is_file():
        raise RunError(f"{folder}: not a folder; set {config.section}.run.dir to another place")
    run_lock = RunLock(folder, False, create_writable_folder(folder), None)
    try:
        run_lock.handle = _lock(folder)
        try:
            _check_contents(config, run_lock, inputs)
        except OSError as error:
            raise RunError(f"{folder}: cannot be read ({error.strerror or error})") from None
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


def _check_contents(config: Any, run_lock: RunLock, inputs: Any) -> None:
    """Decide whether there is a run to resume or to replace. Raises `RunError` if this run must not use the folder."""
    folder, stage = run_lock.folder, config.section
    # 1. What an interrupted process left. torchrun restarts a failed run with the same command, without --resume; the
    # folder then holds this run.
    is_back = recover_replaced(folder)
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    resume = config.run.resume or ("auto" if is_restart else False)
    if resume:
        recover(folder)
    checkpoints = list_checkpoints(folder)
    names = [path.name for path in folder.iterdir()]
    is_run = bool(checkpoints) or CONFIG_FILE in names

    # 2. Replace an earlier run.
    if config.run.overwrite and is_run and (is_back or not (resume and checkpoints)):
        settings = {key: value for key, value in as_dict(config).items() if key != "run"}
        check_no_input(folder, [settings, inputs], f"{stage}.run.overwrite")
        run_lock.replaces = True  # from here on `release` restores it
        move_aside(folder)
        return

    # 3. Resume, start, or refuse.
    elsewhere = f"set {stage}.run.dir to another folder"
    if resume is True and not checkpoints:
        start = f"start again with {stage}.run.resume=auto" if names else "start without --resume"
        raise RunError(f"{folder}: no checkpoint to resume from; {start}")
    # A run that was killed before its first checkpoint has left its configuration, or nothing but hidden files.
    if names and not is_run and not (resume and all(name.startswith(".") for name in names)):
        raise RunError(f"{folder}: not empty, and not the folder of a run; {elsewhere}")
    if is_run and not resume:
        state = "holds an earlier run" if checkpoints else "holds a run that ended before its first checkpoint"
        raise RunError(
            f"{folder}: {state}; continue it with {stage}.run.resume=auto, replace it with {stage}.run.overwrite=true, "
            f"or {elsewhere}"
        )
    run_lock.is_resume = bool(resume and names)


def save_config(config: Any, folder: Path) -> None:
    """Write `config.yaml`, which repeats the run: without `run.resume` and `run.overwrite`.

    If it differs from the one of an earlier start, that one is kept as `config.1.yaml`, `config.2.yaml` and so on.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = folder / CONFIG_FILE
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False, overwrite=False))
    if path.exists() and path.read_text(encoding="utf-8") != as_yaml(config):
        number = next(n for n in itertools.count(1) if not (folder / f"config.{n}.yaml").exists())
        # A copy: the folder has a config.yaml at every instant.
        with contextlib.suppress(OSError):
            shutil.copyfile(path, folder / f"config.{number}.yaml")
    config.save(path)


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
        warn(f"{path}: is there already and is replaced when all rows are written; name another file to keep it")
    new_folders = create_writable_folder(path.parent)
    try:
        with JsonlWriter(path) as writer:
            yield writer
    except BaseException:
        remove_empty_folders(new_folders)
        raise
