"""Atomic writes: the old content or the new one, and nothing left behind after an error."""

import os

import pytest

from icegrt.errors import RunError
from icegrt.training.run_folder import rows_file
from icegrt.utils.files import JsonlWriter, make_folders, remove_empty_folders, staged_folder, write_text_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_and_no_temporary_file_stays(tmp_path):
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")
    write_text_atomic(path, "new\nline")
    assert path.read_bytes() == b"new\nline" and names(tmp_path) == ["a.json"]


def test_text_that_cannot_be_renamed_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_a_folder_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "new" / "model"
    with staged_folder(target) as staging:
        (staging / "config.json").write_text("{}")
        assert not target.exists() and staging.parent == target.parent
    assert names(target) == ["config.json"] and names(target.parent) == ["model"]


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_a_folder_whose_block_raises_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged_folder(tmp_path / "new" / "deep" / "model") as staging:
        (staging / "config.json").write_text("{}")
        raise error
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path):
    (tmp_path / "model.writing").mkdir()
    (tmp_path / "model.writing" / "half").write_text("x")
    (tmp_path / "model").mkdir()  # an empty folder may be replaced
    with staged_folder(tmp_path / "model") as staging:
        (staging / "whole").write_text("x")
    assert names(tmp_path / "model") == ["whole"] and names(tmp_path) == ["model"]


def test_files_are_replaced_only_on_request(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(OSError), staged_folder(target) as staging:
        (staging / "new").write_text("x")
    assert names(target) == ["old"] and names(tmp_path) == ["model"]
    with staged_folder(target, replace=True) as staging:
        (staging / "new").write_text("x")
    assert names(target) == ["new"] and names(tmp_path) == ["model"]


def test_created_folders_can_be_taken_back(tmp_path):
    created = make_folders(tmp_path / "a" / "b")
    assert created == [tmp_path / "a" / "b", tmp_path / "a"]
    (tmp_path / "a" / "keep").write_text("x")
    remove_empty_folders(created)
    assert names(tmp_path / "a") == ["keep"]


def test_one_file_has_one_writer(tmp_path):
    with JsonlWriter(tmp_path / "rows") as first:
        first.write({"a": 1})
        with pytest.raises(RunError, match="rows: another process is writing it"):
            JsonlWriter(tmp_path / "rows")
    assert (tmp_path / "rows").read_text() == '{"a": 1}\n'
    (tmp_path / ".rows.partial").write_text("left by a killed process\n")
    with JsonlWriter(tmp_path / "rows") as second:
        second.write({"a": 2})
    assert (tmp_path / "rows").read_text() == '{"a": 2}\n' and len(list(tmp_path.iterdir())) == 1


def test_rows_replace_a_file_with_a_word_and_never_an_input(tmp_path, capsys):
    path = tmp_path / "rows"
    path.write_text("old\n")
    with pytest.raises(RunError, match="this command reads it and would replace it"), rows_file(str(path), [str(path)]):
        pass
    assert path.read_text() == "old\n"
    with rows_file(str(path), ["", "absent"]) as writer:
        writer.write({})
    assert (
        path.read_text() == "{}\n"
        and "rows: is there already and is replaced when all rows are written; name another file"
        in capsys.readouterr().err
    )
