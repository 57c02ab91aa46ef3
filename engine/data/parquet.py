"""Read Parquet files by row, through a temporary Arrow file.

Opening unpacks the row groups once, a batch at a time, into the Arrow file, which gives access to any row. Random
access to Parquet itself would decode a complete row group for every row. The temporary file has the size of the
unpacked data, lies in TMPDIR, has no name, and is freed with the object.
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
from icegrt.utils.text import first_line

_BATCH_ROWS = 64
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class ParquetRows(LazyRows):
    """The rows of a Parquet file, in order. Times and decimals become text; binary columns are dropped.

    Raises:
        DataError: the file is no Parquet, is damaged, or has two columns of one name.
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
                    f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({first_line(error)}); set TMPDIR to a "
                    "folder with room for the unpacked data"
                ) from error
            raise DataError(
                f"{path}: not a Parquet file that can be read ({first_line(error)}); it may be truncated: copy or "
                "write it again"
            ) from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> Row:
        where = f"{self.path}:row {index}"
        batch_index = bisect_right(self._ends, index)
        first = self._ends[batch_index - 1] if batch_index else 0
        if self._cached_batch[0] != batch_index:
            try:
                self._cached_batch = (batch_index, self._reader.get_batch(batch_index))
            except self._errors as error:
                raise DataError(f"{where}: cannot be read ({first_line(error)})") from error
        return Row(self._cached_batch[1].slice(index - first, 1).to_pylist()[0], where)

    def _unpack(self, pa: Any, file: Any, limit: int) -> None:
        schema = file.schema_arrow
        # 1. choose the columns and their types
        duplicates = {name for name in schema.names if schema.names.count(name) > 1}
        if duplicates:
            raise DataError(f"{self.path}: column `{min(duplicates)}` stands twice; keep one of them")
        target = pa.schema([(f.name, type_) for f in schema if (type_ := _readable_type(pa, f.type)) is not None])
        dropped = [name for name in schema.names if name not in target.names]
        if dropped:
            warn(f"{self.path}: binary columns are dropped: {', '.join(dropped)}")
        rows = min(limit or file.metadata.num_rows, file.metadata.num_rows)
        # 2. copy batch by batch
        self._ends: list[int] = []
        self._cached_batch: tuple[int, Any] = (-1, None)
        with tempfile.NamedTemporaryFile(prefix="icegrt-", suffix=".arrow") as spool:
            with pa.OSFile(spool.name, "wb") as sink, pa.ipc.new_file(sink, target) as writer:
                with progress(rows, f"unpacking {self.path.name}", "rows") as bar:
                    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=target.names):
                        batch = batch.slice(0, rows - len(self))
                        if not batch.num_rows:
                            break
                        columns = [c.cast(type_) for c, type_ in zip(batch.columns, target.types, strict=True)]
                        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=target))
                        self._ends.append(len(self) + batch.num_rows)
                        bar.advance(batch.num_rows)
            self.nbytes = Path(spool.name).stat().st_size
            self._reader = pa.ipc.open_file(pa.OSFile(spool.name, "rb"))  # stays open after the file's name is removed


def _readable_type(pa: Any, arrow_type: Any) -> Any:
    """Return the type that a column is read as; None if it holds bytes."""
    types = pa.types
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type) or types.is_fixed_size_binary(arrow_type):
        return None
    # pyarrow 26: casts no list with nulls alone to its own type, but to one of strings, which holds the same nulls.
    if types.is_temporal(arrow_type) or types.is_decimal(arrow_type) or types.is_null(arrow_type):
        return pa.string()
    if types.is_dictionary(arrow_type):
        return _readable_type(pa, arrow_type.value_type)
    if types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        inner = _readable_type(pa, arrow_type.value_type)
        return None if inner is None else pa.list_(inner)
    if types.is_struct(arrow_type):
        fields = [(f.name, _readable_type(pa, f.type)) for f in arrow_type]
        return None if any(inner is None for _, inner in fields) else pa.struct(fields)
    return arrow_type
