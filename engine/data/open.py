"""Open a source of rows: a JSONL or Parquet file, a folder, or objects in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from icegrt.data.rows import PROMPTS, RESPONSES, LazyRows, Row, type_name
from icegrt.data.types import IndexedRows, Rows
from icegrt.errors import DataError

_JSONL_SUFFIXES = ("", ".jsonl", ".ndjson", ".json")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_EXPECTED = "expected a JSONL (.jsonl, .ndjson, .json) or Parquet (.parquet) file"


def open_rows(
    source: Rows,
    limit: int = 0,
    *,
    input_key: str = "",
    output_key: str = "",
) -> Sequence[Row]:
    """Return the rows of a source; those of a file are read on access.

    Args:
        source: the path of a JSONL or Parquet file, or an iterable of dicts.
        limit: use the first `limit` rows; 0: all.
        input_key: the column of the prompt, if its name is not recognised; a dot selects a field of an object
            (`extra_info.question`).
        output_key: the same for the answer.

    Raises:
        DataError: the file is missing, unreadable, of another format, or has no rows. A row that cannot be read raises
            on access.
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
    return _RenamedRows(rows, input_key, output_key) if input_key or output_key else rows


def _open_file(path: Path, limit: int) -> LazyRows:
    if not str(path) or path == Path():
        raise DataError(f"no data file was named: {_EXPECTED}")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {_EXPECTED}")
    if not path.exists():
        raise DataError(f"{path}: no such file; {_EXPECTED} (relative paths start at {Path.cwd()})")
    suffix = path.suffix.lower()
    if suffix in _PARQUET_SUFFIXES:
        from icegrt.data.parquet import ParquetRows

        return ParquetRows(path, limit)
    if suffix not in _JSONL_SUFFIXES:
        remedy = "; unpack it first" if suffix in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
        raise DataError(f"{path}: {suffix} is not read; {_EXPECTED}{remedy}")
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
        return _IndexedRows(source, limit)
    if not isinstance(source, Iterable):
        raise DataError(f"expected the path of a data file or an iterable of dicts, got {type(source).__name__}")
    items = islice(source, limit) if limit else source
    return [_item(number, item) for number, item in enumerate(items)]


def _item(number: int, item: Any) -> Row:
    if isinstance(item, Row):
        return item
    if isinstance(item, Mapping):
        return Row(dict(item), f"row {number}")
    raise DataError(f"row {number}: expected a dict with named columns, got {type_name(item)}")


class _IndexedRows(LazyRows):
    """Rows of an object with a length and indices that is no list, such as a memory-mapped `datasets.Dataset`."""

    nbytes = math.inf

    def __init__(self, source: Any, limit: int) -> None:
        self._source = source
        self._length = min(limit or len(source), len(source))

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> Row:
        return _item(index, self._source[index])


class _RenamedRows(LazyRows):
    """Rows whose prompt and answer come from columns that the user named, copied to `prompt` and `response(s)`."""

    def __init__(self, rows: Sequence[Row], input_key: str, output_key: str) -> None:
        self._rows, self._input, self._output = rows, input_key, output_key
        self.nbytes = getattr(rows, "nbytes", 0)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        row = self._rows[index]
        data = dict(row.data)
        if self._input:
            value = _column_value(row, self._input, "input_key")
            is_conversation = self._input == "messages"
            # Other columns that are recognised as a prompt would conflict with the named one.
            for name in (*PROMPTS, *RESPONSES) if is_conversation else ("messages", *PROMPTS):
                data.pop(name, None)
            data["messages" if is_conversation else "prompt"] = value
        if self._output:
            value = _column_value(row, self._output, "output_key")
            several = isinstance(value, list) and all(isinstance(v, str) for v in value)
            data["responses" if several else "response"] = value
        return Row(data, row.where)


def _column_value(row: Row, key: str, option: str) -> Any:
    value: Any = row.data
    for part in [key] if key in row.data else key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        columns = ", ".join(f"`{name}`" for name in row.columns()) or "none"
        raise DataError(f"{row.where}: {option} names `{key}`, which is not there; columns found: {columns}")
    return value
