"""Atomic writes of files and folders, and JSON that every parser reads.

Atomic: the file or folder is written under a second name beside its target and renamed when it is complete. A reader
sees the old one or the new one, never a part.

    write_text_atomic(path, text)          a small file
    JsonlWriter(path)                      rows of JSON, one a line
    staged_folder(path, replace=False)     a folder, written inside a `with` block
    create_staging / commit_folder         the two halves of `staged_folder`, for a folder written over several calls
    make_folders / remove_empty_folders    parents that did not exist, and how to take them back after an error
    fsync_path                             flush a file or a folder to the disk
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from icegrt.errors import CheckpointError, RunError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# -- files -------------------------------------------------------------------------------------------------------------


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`: to a temporary file, synced, then renamed. The parent folder must exist.

    Raises:
        OSError: the file cannot be written. The temporary file is removed; an older file stays as it was.
    """
    path = Path(path)
    partial = _partial_path(path)
    try:
        with open_text(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        _name(error, path)
        raise
    fsync_path(path.parent)


class JsonlWriter:
    """Write rows of JSON, one per line, to a temporary file that `close` renames to `path`.

    Missing parent folders are created. As a context manager it removes the temporary file if the block raises.

    Raises:
        RunError: another process is writing the same file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = _partial_path(self.path)
        self._file = _open_locked(self.path, self._partial)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; numbers that are not finite become the strings NaN, Infinity and -Infinity."""
        try:
            self._file.write(json_line(row))
        except OSError as error:
            _name(error, self.path)
            raise

    def close(self) -> None:
        """Sync the file and rename it to its final name. Closing twice does nothing."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._partial, self.path)  # before the lock ends
            self._file.close()
        except OSError as error:
            self._discard()
            _name(error, self.path)
            raise

    def _discard(self) -> None:
        # On a full disk `close` fails too, because it writes the rest of the buffer. It closes the descriptor anyway.
        self._partial.unlink(missing_ok=True)  # before the lock ends
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()


def _open_locked(path: Path, partial: Path) -> TextIO:
    """Return the emptied temporary file of `path`, locked by this process until it is closed."""
    while True:
        file = open_text(partial, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunError(f"{path}: another process is writing it; wait for that one, or name another file") from None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                file.truncate(0)
                return file
        file.close()  # the process that held the lock has renamed or removed the file meanwhile


def open_text(path: Path, mode: str) -> TextIO:
    """Open a UTF-8 text file with `\\n` line ends; a lone surrogate is written as its JSON escape."""
    return open(path, mode, encoding="utf-8", errors="backslashreplace", newline="\n")


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _name(error: BaseException, path: Path) -> None:
    """Name the file in the error of a full disk: a write knows its descriptor only."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


# -- folders -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a staging folder that becomes `path` when the block ends; if it raises, nothing is left behind.

    The staging folder is `<path>.writing`; one of an earlier, killed process is cleared first. Missing parents are
    created, and removed again after an error.

    Args:
        path: the final folder. It must not exist or be empty, unless `replace`.
        replace: swap the new folder for the old one, which is removed after the rename.

    Raises:
        OSError: a folder cannot be created or renamed, or `path` holds files and `replace` is false.
    """
    path = Path(path)
    new_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        staging = create_staging(path)
        yield staging
        commit_folder(path, replace=replace)
    except BaseException:
        shutil.rmtree(staging_path(path), ignore_errors=True)
        remove_empty_folders(new_folders)
        raise


def staging_path(path: Path) -> Path:
    """Return the folder in which `path` is written: `<path>.writing`."""
    return path.with_name(path.name + ".writing")


def create_staging(path: Path) -> Path:
    """Create an empty staging folder for `path`, with missing parents, and return it."""
    staging = staging_path(path)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def commit_folder(path: Path, *, replace: bool = False) -> None:
    """Rename the staging folder of `path` to `path` and sync the parent.

    With `replace` an old folder is renamed to `<path>.replaced` first and removed last, so that a complete folder is on
    the disk at every moment.
    """
    replaced = path.with_name(path.name + ".replaced")
    if replace and path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
    os.replace(staging_path(path), path)
    fsync_path(path.parent)
    if replace:
        shutil.rmtree(replaced, ignore_errors=True)


def make_folders(folder: Path) -> list[Path]:
    """Create `folder` and its missing parents; return the created ones, deepest first.

    Raises:
        OSError: a folder cannot be created. Those created before it are removed.
    """
    created: list[Path] = []
    try:
        for path in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            path.mkdir(exist_ok=True)
            created.insert(0, path)
    except OSError:
        remove_empty_folders(created)
        raise
    return created


def remove_empty_folders(folders: Iterable[Path]) -> None:
    """Remove `folders`, deepest first, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


# -- JSON --------------------------------------------------------------------------------------------------------------


def json_safe(value: Any, *, not_finite_as_null: bool = False) -> Any:
    """Return `value` as plain JSON types: scalars and arrays of torch and numpy become numbers and lists.

    NaN and infinities become the strings NaN, Infinity and -Infinity, or null if `not_finite_as_null`.

    Raises:
        TypeError: JSON has no type for the value.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if not_finite_as_null else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): json_safe(v, not_finite_as_null=not_finite_as_null) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v, not_finite_as_null=not_finite_as_null) for v in value]
    if hasattr(value, "tolist"):
        return json_safe(value.tolist(), not_finite_as_null=not_finite_as_null)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: give a number, text, list or dict")


def json_line(row: dict[str, Any]) -> str:
    """Return `row` as one line of JSON with its line end."""
    return json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n"


def restore_json(value: Any) -> Any:
    """Return `value` with the strings NaN, Infinity and -Infinity as floats: the inverse of `json_safe` for numbers."""
    if isinstance(value, dict):
        return {k: restore_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restore_json(v) for v in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def model_folder(path: str | Path) -> Path:
    """Return the folder of a Hugging Face checkpoint: `path` itself, or the exported model of the run at `path`.

    Raises:
        CheckpointError: the run at `path` has no exported model yet.
    """
    path = Path(path)
    exported = path / "model"
    if (path / "config.json").is_file() or not path.is_dir():
        return path
    if not exported.is_dir() and any((path / "checkpoints").glob("step_*")):
        raise CheckpointError(
            f"{path}: an unfinished run, which has no model yet; finish it with --resume, or export its last "
            f"checkpoint: icegrt export export.run={path} export.out=FOLDER"
        )
    return exported if exported.is_dir() else path


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds another type.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not readable, not UTF-8, or not JSON
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy the file again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds no JSON object but {type(document).__name__}; copy the file again")
    return document
