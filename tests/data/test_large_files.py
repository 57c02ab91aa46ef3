"""Data larger than memory: rows by index from JSONL and Parquet, encoded when asked for; a file beside flat memory."""

import json
import random
import resource
from datetime import datetime

import numpy as np
import pytest

from icegrt.data import (
    BlendedDataset,
    ConcatDataset,
    EncodedDataset,
    ExampleEncoder,
    PromptEncoder,
    Row,
    dataset,
    open_rows,
)
from icegrt.errors import DataError
from tests.helpers.data_rows import PLAIN, make_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": f"ask {i} é", "response": "yes " * (i % 7 + 1), "nested": {"list": [i, None]}} for i in range(300)]


@pytest.fixture
def jsonl(tmp_path):
    """Rows with blank lines in between and no newline at the end."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=37)
    return path


@pytest.fixture(params=["jsonl", "parquet"])
def path(request):
    return request.getfixturevalue(request.param)


def test_rows_by_index_slice_and_in_order_are_the_same(path):
    rows = open_rows(path)
    assert len(rows) == 300 and [row.data for row in rows] == ROWS
    assert rows[-1].data == ROWS[-1] and [row.data for row in rows[5:9]] == ROWS[5:9]
    for i in random.sample(range(300), 60):
        assert rows[i].data == ROWS[i]
    with pytest.raises(IndexError):
        rows[300]


def test_places_are_those_of_the_file(jsonl, parquet):
    assert open_rows(jsonl)[2].where == f"{jsonl}:5"
    assert open_rows(parquet)[2].where == f"{parquet}:row 2"


def test_a_limit_stops_the_index(path):
    assert [row.data for row in open_rows(path, 70)] == ROWS[:70]


def test_parquet_times_become_text_and_bytes_are_left_out(tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "at": [datetime(2020, 1, 2)], "image": [b"\xff"]}), path)
    assert open_rows(path)[0].data == {"prompt": "a", "at": "2020-01-02 00:00:00.000000"}
    assert "binary columns are dropped: image" in capsys.readouterr().err


def test_parquet_columns_without_a_value_are_null(tmp_path):
    turn = {"role": "user", "content": "a", "tool_calls": None, "parts": [None], "at": datetime(2020, 1, 2)}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": [[turn]] * 2, "tags": [[None, None], []], "none": [None, None]}), path)
    text = turn | {"at": "2020-01-02 00:00:00.000000"}
    assert [row.data for row in open_rows(path)] == [
        {"messages": [text], "tags": [None, None], "none": None},
        {"messages": [text], "tags": [], "none": None},
    ]


def test_a_full_disk_is_not_blamed_on_the_parquet_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["x" * 4000] * 500}), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # Python ignores the signal, so a write fails
    try:
        with pytest.raises(DataError, match=rf"rows.parquet: cannot be unpacked into {tmp_path}.*set TMPDIR"):
            open_rows(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_changes_under_a_run_is_noticed(jsonl):
    rows = open_rows(jsonl)
    jsonl.write_text("x" * 50_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: the file changed while it was in use"):
        rows[9]


def test_a_data_set_with_indices_is_not_copied():
    class Dataset:
        def __len__(self):
            return 1 << 40

        def __getitem__(self, index):
            return {"prompt": str(index)}

    rows = open_rows(Dataset(), limit=1 << 30)
    assert rows[123_456_789] == Row({"prompt": "123456789"}, "row 123456789")


def test_encoded_again_is_what_was_kept(path, monkeypatch):
    encoder, encoded_rows = ExampleEncoder(make_tokenizer(PLAIN), 45, "drop"), []

    def counting_encoder(rows):
        encoded_rows.extend(rows)
        return encoder(rows)

    stored = EncodedDataset(open_rows(path), counting_encoder)
    monkeypatch.setattr(dataset, "CACHED_BYTES", 0)
    lazy = EncodedDataset(open_rows(path), counting_encoder)
    encoded_rows.clear()
    assert stored[0] and not encoded_rows and lazy[0] and len(encoded_rows) == 1
    assert 0 < len(lazy) < 300 and lazy.dropped == stored.dropped == {"longer than 45 tokens": 300 - len(lazy)}
    assert list(lazy) == list(stored) and lazy[-1] == stored[-1] and lazy[3:5] == stored[3:5]
    assert lazy.lengths.tolist() == [len(example) for example in stored] and lazy.longest() == stored.longest()
    subset = lazy.subset([7, 2])
    assert list(subset) == [stored[7], stored[2]] and subset.lengths.tolist() == [len(stored[7]), len(stored[2])]
    joined = ConcatDataset([subset, stored])
    assert (
        len(joined) == 2 + len(stored)
        and joined[1] == stored[2]
        and joined[2] == stored[0]
        and joined[-1] == stored[-1]
    )
    blend, expected = BlendedDataset([(lazy, 1.5)], 3), BlendedDataset([(stored, 1.5)], 3)
    assert [blend.item(p) for p in next(blend.batches(64))] == [expected.item(p) for p in next(expected.batches(64))]


def test_input_and_output_keys_reach_into_objects(tmp_path):
    path = tmp_path / "rows.parquet"
    row = {"prompt": [{"role": "user", "content": "other"}], "extra_info": {"question": "q", "answer": "a"}, "k": 1}
    pq.write_table(pa.Table.from_pylist([row]), path)
    rows = open_rows(path, input_key="extra_info.question", output_key="extra_info.answer")
    (example,) = ExampleEncoder(make_tokenizer(), 99)(rows)
    assert example.prompt == make_tokenizer()("q")["input_ids"] and example.row["k"] == 1
    with pytest.raises(DataError, match=r"row 0: input_key names `extra_info.nope`, which is not there"):
        open_rows(path, input_key="extra_info.nope")[0]


def anonymous_bytes():
    """Memory of this process that is no file's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def write_rows(path, size):
    """JSONL of about `size` bytes, 1 KB a row; returns the number of rows."""
    body, count, bytes_written = "lorem ipsum dolor sit amet " * 37, 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while bytes_written < size:
            bytes_written += file.write(json.dumps({"prompt": f"row {count} {body}", "id": count}) + "\n")
            count += 1
    return count


class _Letters:
    """A tokenizer that costs nothing: what is measured is the data's way, not the tokenizer's."""

    eos_token_id, eos_token, chat_template = 0, "<eos>", None

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text[:40]] for text in texts]}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_quarter_of_a_gigabyte_streams_with_flat_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    count = write_rows(path, 1 << 28)
    before = anonymous_bytes()
    prompts = EncodedDataset(open_rows(path), PromptEncoder(_Letters(), 1 << 20), "rows")
    order = BlendedDataset([(prompts, 1.0)], 0)
    batches, peak = order.batches(256), anonymous_bytes()
    for _ in range(200):
        for pair in next(batches):
            prompt = order.item(pair)
            assert prompt.row["id"] == pair[1]
        peak = max(peak, anonymous_bytes())
    assert len(prompts) == count and np.all(prompts.lengths == 40)
    print(f"{count:,} rows of {path.stat().st_size:,} bytes: memory grew by {(peak - before) / 1e6:.0f} MB")
    assert peak - before < 16 << 20
