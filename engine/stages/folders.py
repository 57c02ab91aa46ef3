"""Places that a stage writes to: claimed before work begins, and left as they were found where it never does."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icegrt.checkpoint_folder import list_checkpoints, recover
from icegrt.console import is_main
from icegrt.errors import RunError
from icegrt.metrics import JsonlWriter

CONFIG_FILE = "config.yaml"


def claim_run(config: Any) -> tuple[bool, list[Path]]:
    """Make the folder of a run, or take it up again as `run.resume` says.

    Returns whether there is a run to go on with, and what folders had to be made. Raises `RunError` where the folder
    is not this run's to use.
    """
    folder, key = Path(config.run.dir), f"{config.section}.run.dir"
    try:
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder}: not a folder; set {key} to another place")
        # Launched once more after a failure: the command is as it was, but the folder is in use now, by this run.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        resume = config.run.resume or ("auto" if again else False)
        if resume:
            recover(folder)
        found = list_checkpoints(folder)
        names = [p.name for p in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror or error})") from None
    if resume is True and not found:
        raise RunError(f"{folder}: no checkpoint to resume from; start without --resume")
    if not resume and names:
        raise RunError(f"{folder}: not empty; continue that run with --resume, or set {key} to another folder")
    # Killed before its first checkpoint, a run has written its configuration, or was about to.
    if resume and not found and CONFIG_FILE not in names and any(not name.startswith(".") for name in names):
        raise RunError(f"{folder}: not empty, and not the folder of a run; set {key} to another folder")
    return bool(resume and names), claim_folder(folder)


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
