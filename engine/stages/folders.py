"""Places that a stage writes to: claimed before work begins, and left as they were found where it never does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from icegrt.console import is_main
from icegrt.errors import RunError
from icegrt.metrics import JsonlWriter


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
