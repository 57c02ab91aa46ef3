"""Read JSONL files by row: one pass builds an index of offsets, each access reads one row.

The index takes 8 bytes a row; no row stays in memory. Rows are read with `pread`, not through a memory map: if a mapped
file is truncated the process dies, and its pages count as the process's memory.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import Any

from icegrt.data.rows import LazyRows, Row, type_name
from icegrt.errors import DataError
from icegrt.utils.console import progress

_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_MAGIC = {b"PAR1": "a Parquet file; name it .parquet", b"\x1f\x8b": "compressed with gzip; unpack it first"}
_REPORT_BYTES = 16 << 20


class JsonlRows(LazyRows):
    """The objects of a JSONL file (UTF-8, one a line), in order. Blank lines are skipped but count as lines.

    Raises:
        DataError: on opening, the file cannot be read or is no text; on access, a line is not one JSON object with
            distinct keys.
    """

    def __init__(self, path: Path, limit: int = 0) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(
                f"{path}: not a regular file; write the rows to a file first, as they are read more than once"
            )
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._version = self._current_version()
            self._index(limit)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.nbytes = self._starts[-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def row(self, index: int) -> Row:
        start, end = self._starts[index], self._starts[index + 1]
        where = f"{self.path}:{index + 1 + bisect_right(self._blanks, index)}"
        try:
            raw = os.pread(self._descriptor, end - start, start)
            return Row(_parse(raw, where), where)
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
        except DataError:
            if self._current_version() != self._version:
                raise DataError(f"{where}: the file changed while it was in use; leave it alone during a run") from None
            raise

    def _current_version(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _index(self, limit: int) -> None:
        """Set `_starts`, the offset of each row and of the end, and `_blanks`, the next row of each blank line."""
        self._starts, self._blanks = array("q"), array("q")
        with open(self._descriptor, "rb", closefd=False, buffering=1 << 20) as file:
            head = file.read(4)
            offset = len(_BOM) if head.startswith(_BOM) else 0
            self._check_head(head)
            file.seek(offset)
            reported = 0
            with progress(self._version[0] / 1e6, f"indexing {self.path.name}", "MB") as bar:
                # A binary file is split at \n only: a JSON string may hold U+2028, which ends a line of text files.
                for raw in file:
                    if raw.isspace():
                        self._blanks.append(len(self._starts))
                    else:
                        self._starts.append(offset)
                    offset += len(raw)
                    if offset - reported >= _REPORT_BYTES:
                        bar.advance((offset - reported) / 1e6)
                        reported = offset
                    if limit and len(self._starts) == limit:
                        break
                bar.advance((self._version[0] - reported) / 1e6)
            self._starts.append(offset)

    def _check_head(self, head: bytes) -> None:
        for mark, name in _OTHER_BOMS.items():
            if head.startswith(mark):
                raise DataError(
                    f"{self.path}:1: {name} text (it begins with that byte order mark); save the file as UTF-8"
                )
        for magic, remedy in _MAGIC.items():
            if head.startswith(magic):
                raise DataError(f"{self.path}: {remedy}")


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    if b"\x00" in raw:
        raise DataError(
            f"{where}: NUL byte at column {raw.index(0) + 1}: the file is damaged, or not UTF-8 text; write it again"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
        ) from error
    try:
        value = json.loads(text, object_pairs_hook=_object_of_distinct_keys)
    except json.JSONDecodeError as error:
        pretty = text.strip() in ("[", "{") or text.lstrip().startswith("[{")
        hint = "; one object a line is expected: jq -c '.[]' turns an array into lines" if pretty else ""
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; got {_excerpt(text)}{hint}"
        ) from error
    except _DuplicateKey as error:
        raise DataError(f"{where}: key `{error}` stands twice in one object; keep one of them") from None
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read") from error
    except ValueError as error:  # Python converts integers of at most 4300 digits
        raise DataError(f"{where}: not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object with named columns, got {type_name(value)}")
    return value


class _DuplicateKey(Exception):
    pass


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return value


def _excerpt(text: str, width: int = 60) -> str:
    text = text.strip()
    return repr(text if len(text) <= width else text[:width] + "...")
