"""Atomic writes: the old content or the new one, and nothing left behind after an error."""

import os

import pytest

from icegrt.utils.files import make_folders, remove_empty_folders, staged_folder, write_text_atomic


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
