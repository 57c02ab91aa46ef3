"""Open a source of rows: a JSONL or Parquet file, a folder, or objects in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from icegrt.data.rows import PROMPTS, RESPONSES, LazyRows, Row, kind
from icegrt.data.types import IndexedRows, Rows
from icegrt.errors import DataError

JSONL_SUFFIXES = ("", ".jsonl", ".ndjson", ".json")


PARQUET_SUFFIXES = (".parquet", ".pq")


_EXPECTED = "expected a JSONL (.jsonl, .ndjson, .json) or Parquet (.parquet) file"


def open_rows(
    source: Rows,
    limit: int = 0,
    *,
    input_key: str = "",
    output_key: str = "",
) -> Sequence[Row]:
    """The rows of a source, read when asked for; `limit` > 0 keeps the first so many.

    `input_key` and `output_key` name the columns of prompt and answer where their names are not recognised; a dot goes
    into an object (`extra_info.question`). Raises `DataError` for a file that is missing, unreadable, of another
    format, or without rows. A row that cannot be read raises when it is.
    """
    if limit < 0:
        raise ValueError(f"limit must be 0 (all rows) or more, got {limit}")
    rows: Sequence[Row]
    if isinstance(source, (str, PathLike)):
        name, rows = str(source), _open_file(Path(source), limit)
    else:
        name, rows = type(source).__name__, _open_items(source, limit)
    if not len(rows):
        raise DataError(f"{name}: no rows; expected at least one")
    return _Keyed(rows, input_key, output_key) if input_key or output_key else rows


def read_rows(source: Rows, limit: int = 0) -> list[Row]:
    """`open_rows`, every row read now. Raises `DataError` also for the first row that cannot be read."""
    return list(open_rows(source, limit))


def _open_file(path: Path, limit: int) -> LazyRows:
    if not str(path) or path == Path():
        raise DataError(f"no data file was named: {_EXPECTED}")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {_EXPECTED}")
    if not path.exists():
        raise DataError(f"{path}: no such file; {_EXPECTED} (relative paths start at {Path.cwd()})")
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        from icegrt.data.parquet import ParquetRows

        return ParquetRows(path, limit)
    if suffix not in JSONL_SUFFIXES:
        packed = "; unpack it first" if suffix in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
        raise DataError(f"{path}: {suffix} is not read; {_EXPECTED}{packed}")
    from icegrt.data.jsonl import JsonlRows

    return JsonlRows(path, limit)


def _open_items(source: Iterable[Mapping[str, Any] | Row] | IndexedRows, limit: int) -> Sequence[Row]:
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, list(source)[:8]))
        raise DataError(
            f"expected a sequence of rows, got one {type(source).__name__} with keys {keys}: "
            "choose a split of a dataset, or put a single row in a list"
        )
    if not isinstance(source, (list, tuple)) and hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return _Items(source, limit)
    if not isinstance(source, Iterable):
        raise DataError(f"expected the path of a data file or an iterable of dicts, got {type(source).__name__}")
    items = islice(source, limit) if limit else source
    return [_item(number, item) for number, item in enumerate(items)]


def _item(number: int, item: Any) -> Row:
    if isinstance(item, Row):
        return item
    if isinstance(item, Mapping):
        return Row(dict(item), f"row {number}")
    raise DataError(f"row {number}: expected a dict with named columns, got {kind(item)}")


class _Items(LazyRows):
    """Rows of something that has a length and indices but is no list, such as a memory-mapped `datasets.Dataset`."""

    nbytes = math.inf

    def __init__(self, source: Any, limit: int) -> None:
        self._source = source
        self._length = min(limit or len(source), len(source))

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> Row:
        return _item(index, self._source[index])


class _Keyed(LazyRows):
    """Rows whose prompt and answer stand in columns that the user named: they are there as `prompt`, `response` and
    `responses` too."""

    def __init__(self, rows: Sequence[Row], input_key: str, output_key: str) -> None:
        self._rows, self._input, self._output = rows, input_key, output_key
        self.nbytes = getattr(rows, "nbytes", 0)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        row = self._rows[index]
        data = dict(row.data)
        if self._input:
            value = _at(row, self._input, "input_key")
            whole = self._input == "messages"
            # Columns that could be taken for the prompt must not compete with the one that was named.
            for name in (*PROMPTS, *RESPONSES) if whole else ("messages", *PROMPTS):
                data.pop(name, None)
            data["messages" if whole else "prompt"] = value
        if self._output:
            value = _at(row, self._output, "output_key")
            data["responses" if isinstance(value, list) and all(isinstance(v, str) for v in value) else "response"] = (
                value
            )
        return Row(data, row.where)


def _at(row: Row, key: str, option: str) -> Any:
    value: Any = row.data
    for part in [key] if key in row.data else key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        found = ", ".join(f"`{name}`" for name in row.columns()) or "none"
        raise DataError(f"{row.where}: {option} names `{key}`, which is not there; columns found: {found}")
    return value
