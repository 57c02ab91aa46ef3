"""Rows: every source, every refusal, and the place named in it."""

import json
from pathlib import Path

import pytest

from icegrt.data import Row
from icegrt.errors import DataError
from tests.helpers.encoding import read_rows


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write


def test_jsonl_keeps_line_numbers_over_blank_lines(file):
    path = file('{"a": 1}\n\n   \n{"a": 2}')
    assert read_rows(path) == [Row({"a": 1}, f"{path}:1"), Row({"a": 2}, f"{path}:4")]
    assert read_rows(str(path)) == read_rows(path)


def test_byte_order_mark_crlf_and_unicode_separators(file):
    text = "a\u2028b\u0085c"
    path = file(b"\xef\xbb\xbf" + json.dumps({"t": text}, ensure_ascii=False).encode() + b"\r\n" + b'{"t": "2"}\r\n')
    assert [row.data["t"] for row in read_rows(path)] == [text, "2"]


def test_limit_reads_no_further(file):
    path = file('{"a": 1}\n{"a": 2}\nbroken')
    assert [row.data["a"] for row in read_rows(path, limit=2)] == [1, 2]
    with pytest.raises(ValueError, match="limit"):
        read_rows(path, limit=-1)


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ('{"a": 1}\n{"a": ', 2, "not JSON"),
        ("{'a': 1}", 1, "not JSON"),
        ('\n\n{"a": 1} {"a": 2}', 3, "not JSON"),
        ("[1, 2]", 1, "expected a JSON object with named columns, got a list"),
        ("3", 1, "got a number"),
        ("null", 1, "got null"),
        (b'{"a": 1}\n{"a": "\xff"}', 2, "not UTF-8: byte 0xff at column 8"),
        ("[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_bad_lines_name_file_and_line(file, content, line, says):
    path = file(content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert says in str(error.value)


def test_a_long_bad_line_is_quoted_in_part(file):
    with pytest.raises(DataError) as error:
        read_rows(file("x" * 10_000))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_file(file, content):
    path = file(content)
    with pytest.raises(DataError, match="no rows"):
        read_rows(path)


def test_missing_file_folder_and_other_formats(tmp_path, file):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"rows.parquet: not a Parquet file that can be read .*copy or write it again"):
        read_rows(file("PAR1", "rows.parquet"))
    with pytest.raises(DataError, match=r"rows.csv: .csv is not read; expected a JSONL .* or Parquet"):
        read_rows(file("a,b", "rows.csv"))
    with pytest.raises(DataError, match=r"rows.jsonl.gz: .gz is not read; .*unpack it first"):
        read_rows(file("a,b", "rows.jsonl.gz"))
    with pytest.raises(DataError, match="no data file was named"):
        read_rows("")


def test_iterables_of_dicts_and_rows():
    assert read_rows([{"a": 1}, {"a": 2}])[1] == Row({"a": 2}, "row 1")
    assert [row.data["a"] for row in read_rows(({"a": i} for i in range(5)), limit=3)] == [0, 1, 2]
    rows = read_rows([{"a": 1}])
    assert read_rows(rows) == rows


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "no rows"),
        ([{"a": 1}, "text"], "row 1: expected a dict with named columns, got a string"),
        ({"train": [], "test": []}, "with keys train, test"),
        (3, "got int"),
    ],
)
def test_bad_iterables(source, says):
    with pytest.raises(DataError, match=says):
        read_rows(source)


def test_anything_shaped_like_a_dataset():
    class Dataset:  # datasets.Dataset has a length, indices and an iterator of dicts
        def __iter__(self):
            return iter([{"prompt": "p", "response": None}])

    (row,) = read_rows(Dataset())
    assert row.where == "row 0"
    assert row.get("response") is None
    assert row.get("other") is None
    assert row.columns() == ["prompt"]
