"""Rows of data with the place they came from, so that every later error can name a file and a line.

A source is a JSONL file, an iterable of dicts, or a `datasets.Dataset` (anything that yields dicts).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from icegrt.errors import DataError


@dataclass(frozen=True)
class Row:
    """One object of a source. `where` is "path:line" for a file (from 1), else "row i" (from 0, as `source[i]`)."""

    data: dict[str, Any]
    where: str

    def get(self, key: str) -> Any:
        """The column's value; None where it is absent or null (datasets fill absent columns with nulls)."""
        return self.data.get(key)

    def columns(self) -> list[str]:
        """Names of the columns that hold something."""
        return [key for key, value in self.data.items() if value is not None]


def read_rows(source: str | PathLike | Iterable[Mapping[str, Any] | Row], limit: int = 0) -> list[Row]:
    """Read a JSONL file, or take the dicts of an iterable; `limit` > 0 keeps the first so many and reads no further.

    Blank lines are skipped but counted. Raises `DataError` for a missing or unreadable file, a folder, text that is
    not UTF-8, a line that is not a JSON object, an item that is not a dict, and a source without rows.
    """
    if limit < 0:
        raise ValueError(f"limit must be 0 (all rows) or more, got {limit}")
    if isinstance(source, (str, PathLike)):
        name, rows = str(source), _read_file(Path(source))
    else:
        name, rows = type(source).__name__, _read_items(source)
    found = list(islice(rows, limit)) if limit else list(rows)
    if not found:
        raise DataError(f"{name}: no rows")
    return found


def _read_file(path: Path) -> Iterator[Row]:
    # The one place that chooses a reader by file name: another format is another line here.
    if not str(path) or path == Path():
        raise DataError("no data file was named: expected the path of a JSONL file")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected a JSONL file")
    if not path.exists():
        raise DataError(f"{path}: no such file; expected a JSONL file (relative paths start at {Path.cwd()})")
    if path.suffix == ".parquet":
        raise DataError(f"{path}: Parquet is not read; convert it: datasets.Dataset.from_parquet(...).to_json(...)")
    return _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Bytes, split at newlines only: str.splitlines would also cut at U+2028 and its like, which JSON strings may hold.
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield Row(_parse(raw, where), where)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}; got {_excerpt(text)}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object with named columns, got {_kind(value)}")
    return value


def _read_items(source: Iterable[Mapping[str, Any] | Row]) -> Iterator[Row]:
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, list(source)[:8]))
        raise DataError(
            f"expected a sequence of rows, got one {type(source).__name__} with keys {keys}: "
            "choose a split of a dataset, or put a single row in a list"
        )
    if not isinstance(source, Iterable):
        raise DataError(f"expected the path of a JSONL file or an iterable of dicts, got {type(source).__name__}")
    return _take_items(source)


def _take_items(source: Iterable[Mapping[str, Any] | Row]) -> Iterator[Row]:
    for number, item in enumerate(source):
        if isinstance(item, Row):
            yield item
        elif isinstance(item, Mapping):
            yield Row(dict(item), f"row {number}")
        else:
            raise DataError(f"row {number}: expected a dict with named columns, got {_kind(item)}")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _excerpt(text: str, width: int = 60) -> str:
    text = text.strip()
    return repr(text if len(text) <= width else text[:width] + "...")
