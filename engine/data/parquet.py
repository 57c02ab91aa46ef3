"""Parquet files by row. Row groups are unpacked once, a batch at a time, into a temporary Arrow file that gives any row
at once: a shuffled order over the row groups themselves would decode a whole group for every row.

The temporary file has the size of the unpacked data, lies in TMPDIR, has no name, and goes with the object.
"""

from __future__ import annotations

import errno
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import Any

from icegrt.data.rows import LazyRows, Row
from icegrt.errors import DataError
from icegrt.utils.console import progress, warn

_BATCH_ROWS = 64
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class ParquetRows(LazyRows):
    """The rows of a Parquet file, in order. Times and decimals become text; binary columns are left out.

    Raises `DataError` for a file that is no Parquet, is damaged, or has two columns of one name.
    """

    def __init__(self, path: Path, limit: int = 0) -> None:
        self.path = path
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise DataError(f"{path}: reading Parquet needs pyarrow; pip install 'icegrt[engine]' brings it") from error
        self._errors = (pa.ArrowException, OSError)
        try:
            with pq.ParquetFile(path) as file:
                self._unpack(pa, file, limit)
        except self._errors as error:
            if getattr(error, "errno", None) in _NO_ROOM:
                raise DataError(
                    f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({_first_line(error)}); set TMPDIR to a "
                    "folder with room for the unpacked data"
                ) from error
            raise DataError(
                f"{path}: not a Parquet file that can be read ({_first_line(error)}); it may be cut short: copy or "
                "write it again"
            ) from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> Row:
        where = f"{self.path}:row {index}"
        number = bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        if self._last[0] != number:
            try:
                self._last = (number, self._reader.get_batch(number))
            except self._errors as error:
                raise DataError(f"{where}: cannot be read ({_first_line(error)})") from error
        return Row(self._last[1].slice(index - first, 1).to_pylist()[0], where)

    def _unpack(self, pa: Any, file: Any, limit: int) -> None:
        schema = file.schema_arrow
        twice = {name for name in schema.names if schema.names.count(name) > 1}
        if twice:
            raise DataError(f"{self.path}: column `{min(twice)}` stands twice; keep one of them")
        target = pa.schema([(f.name, kind) for f in schema if (kind := _readable(pa, f.type)) is not None])
        left_out = [name for name in schema.names if name not in target.names]
        if left_out:
            warn(f"{self.path}: binary columns are left out: {', '.join(left_out)}")
        rows = min(limit or file.metadata.num_rows, file.metadata.num_rows)
        self._ends: list[int] = []
        self._last: tuple[int, Any] = (-1, None)
        with tempfile.NamedTemporaryFile(prefix="icegrt-", suffix=".arrow") as spool:
            with pa.OSFile(spool.name, "wb") as sink, pa.ipc.new_file(sink, target) as writer:
                with progress(rows, f"unpacking {self.path.name}", "rows") as bar:
                    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=target.names):
                        batch = batch.slice(0, rows - len(self))
                        if not batch.num_rows:
                            break
                        columns = [column.cast(kind) for column, kind in zip(batch.columns, target.types, strict=True)]
                        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=target))
                        self._ends.append(len(self) + batch.num_rows)
                        bar.advance(batch.num_rows)
            self.nbytes = Path(spool.name).stat().st_size
            self._reader = pa.ipc.open_file(pa.OSFile(spool.name, "rb"))  # outlives the name


def _readable(pa: Any, kind: Any) -> Any:
    """The type that a column is read as; None where it holds bytes."""
    types = pa.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return None
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_dictionary(kind):
        return _readable(pa, kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _readable(pa, kind.value_type)
        return None if inner is None else pa.list_(inner)
    if types.is_struct(kind):
        fields = [(f.name, _readable(pa, f.type)) for f in kind]
        return None if any(inner is None for _, inner in fields) else pa.struct(fields)
    return kind


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
