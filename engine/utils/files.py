"""Files that are there whole or not at all, and JSON that is always valid."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from icegrt.errors import CheckpointError

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlWriter:
    """Rows of JSON, one per line, written aside and renamed on close: the file is there whole or not at all.

    As a context manager it leaves no file behind when the block raises.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = self.path.with_name(f".{self.path.name}.partial")
        self._file = open_text(self._aside, "w")

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; numbers that are not finite become the strings NaN, Infinity and -Infinity."""
        self._file.write(json_line(row))

    def close(self) -> None:
        """Make the file visible under its name. Closing twice does nothing."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError:
            self._discard()
            raise
        os.replace(self._aside, self.path)

    def _discard(self) -> None:
        # On a full disk closing fails too, as it writes the rest of the buffer. The file is closed all the same.
        with contextlib.suppress(OSError):
            self._file.close()
        self._aside.unlink(missing_ok=True)

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()


def json_safe(value: Any, *, not_finite_as_null: bool = False) -> Any:
    """`value` as plain JSON types: scalars and arrays of torch and numpy become numbers and lists.

    NaN and infinities become the strings NaN, Infinity and -Infinity, or null. Raises TypeError for anything else.
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


def write_text_aside(path: str | Path, text: str) -> None:
    """Write `text` beside `path`, then rename: a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    with open_text(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def open_text(path: Path, mode: str) -> TextIO:
    """UTF-8; a lone surrogate becomes its JSON escape, and no platform turns line ends into something else."""
    return open(path, mode, encoding="utf-8", errors="backslashreplace", newline="\n")


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n"


def restore_json(value: Any) -> Any:
    """The inverse of `json_safe` for numbers: the strings NaN, Infinity and -Infinity become floats again."""
    if isinstance(value, dict):
        return {k: restore_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restore_json(v) for v in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises `CheckpointError` naming it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not readable, not UTF-8, or not JSON
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy the file again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds no JSON object but {type(document).__name__}; copy the file again")
    return document
