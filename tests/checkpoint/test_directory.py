"""Checkpoints as files: damage is named, a kill at any instant costs at most the checkpoint that was being written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from icegrt.checkpoint import directory as files
from icegrt.errors import CheckpointError
from icegrt.utils import files as atomic

CONTENTS = {"actor/.metadata": b"places", "actor/__0_0.distcp": bytes(range(256)) * 9, "critic/common.pt": b"c" * 300}


def write(run, step, quality=None, mark=b""):
    """A whole checkpoint, as a run writes it."""
    checkpoint = files.checkpoint_path(run, step)
    files.create_staging(checkpoint, ["actor", "critic"])
    aside = files.staging_path(checkpoint)
    for name, data in CONTENTS.items():
        (aside / name).write_bytes(data + mark)
    files.write_state(aside, json.dumps({"step": step, "quality": quality}))
    files.write_manifest(aside, {})
    files.commit(checkpoint)
    return checkpoint


def names(run):
    return [p.name for p in files.list_checkpoints(run)]


def pointed(run, name):
    path = files.checkpoints_dir(run) / name
    return path.read_text().strip() if path.exists() else None


# -- damage ------------------------------------------------------------------------------------------------------------

FILES = [*CONTENTS, "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_in_a_file_is_found_and_the_file_named(name, tmp_path):
    path = write(tmp_path, 1) / name
    data = path.read_bytes()
    for offset in sorted({0, len(data) // 3, len(data) // 2, len(data) - 2}):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        faults = files.verify(files.checkpoint_path(tmp_path, 1))
        # Of a manifest that says something else it is the files it speaks of that disagree.
        assert faults and (name == "manifest.json" or [fault.split()[0] for fault in faults] == [name]), offset
    path.write_bytes(data)
    assert files.verify(files.checkpoint_path(tmp_path, 1)) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short"])
def test_a_file_that_is_not_all_there_is_found_and_named(name, damage, tmp_path):
    path = write(tmp_path, 1) / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-3])
    (fault,) = files.verify(files.checkpoint_path(tmp_path, 1))
    assert fault.startswith(name)
    if name != "manifest.json":
        assert damage == "missing" or "bytes, not" in fault


def test_readers_that_share_the_work_find_what_one_finds(tmp_path):
    checkpoint = write(tmp_path, 1)
    for name in CONTENTS:
        (checkpoint / name).write_bytes(b"other")
    shares = [files.verify(checkpoint, rank=rank, ranks=3) for rank in range(3)]
    all_faults = [fault for share in shares for fault in share]
    assert sorted(all_faults) == sorted(files.verify(checkpoint)) and len(all_faults) == 3
    assert [fault.split()[0] for fault in files.verify(checkpoint, only=("critic", "state.json"))] == [
        "critic/common.pt"
    ]


def test_the_one_before_a_damaged_checkpoint_is_taken(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (files.checkpoint_path(tmp_path, 3) / "state.json").write_text("{")
    (files.checkpoint_path(tmp_path, 2) / "manifest.json").unlink()
    latest, damaged = files.latest_valid(files.list_checkpoints(tmp_path))
    assert latest == files.checkpoint_path(tmp_path, 1)
    lines = [files.describe_faults(*pair) for pair in damaged.items()]
    assert "step_000003: damaged: state.json has 1 bytes, not" in lines[0] and "manifest.json is missing" in lines[1]
    for checkpoint in damaged:
        files.quarantine(checkpoint)
    assert names(tmp_path) == ["step_000001"]
    # They neither count among those that are kept, nor are in the way of new ones of the same step.
    write(tmp_path, 2)
    files.prune(tmp_path, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "actor/../../outside"])
def test_a_manifest_speaks_of_its_own_files_only(name, tmp_path):
    checkpoint = write(tmp_path, 1)
    document = json.loads((checkpoint / "manifest.json").read_text())
    document["files"][name] = {"bytes": 1, "sha256": "0"}
    (checkpoint / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"manifest\.json names .*outside of the checkpoint"):
        files.read_manifest(checkpoint)


def test_a_file_that_another_rank_wrote_elsewhere_is_missed_before_the_checkpoint_gets_its_name(tmp_path):
    checkpoint = files.checkpoint_path(tmp_path, 1)
    files.create_staging(checkpoint, ["actor"])
    with pytest.raises(OSError, match=r"__3_0\.distcp, which another rank wrote, is not here"):
        files.write_manifest(files.staging_path(checkpoint), {"actor/__3_0.distcp": {"bytes": 4, "sha256": "0"}})


# -- the last ones and the best ----------------------------------------------------------------------------------------


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    qualities = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: 0.1, 6: None}
    for step, quality in qualities.items():
        write(tmp_path, step, quality)
        files.prune(tmp_path, 2)
        assert pointed(tmp_path, "latest") == names(tmp_path)[-1] == f"step_{step:06d}"
        assert pointed(tmp_path, "best") == ("step_000001" if step == 1 else "step_000002")
    assert names(tmp_path) == ["step_000002", "step_000005", "step_000006"]


def test_a_checkpoint_that_cannot_be_deleted_is_reported_and_the_others_go(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step)
    rename = os.replace

    def busy(source, target):
        if Path(source).name == "step_000001":
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "replace", busy)
    (problem,) = files.prune(tmp_path, 1)
    assert "step_000001: cannot be deleted (Device or resource busy); delete it by hand" in problem
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_without_evaluations_there_is_no_best(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
        files.prune(tmp_path, 1)
    assert names(tmp_path) == ["step_000002"] and pointed(tmp_path, "best") is None


# -- killed at any instant ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Raises at the n-th call that changes the disk, counting from 0; a removal is stopped half-way."""
    calls_left = []

    def counted(function, half=None):
        def call(*args, **kwargs):
            if calls_left and calls_left[0] == 0:
                if half is not None:
                    half(*args)
                raise Killed
            if calls_left:
                calls_left[0] -= 1
            return function(*args, **kwargs)

        return call

    def half_removed(path, **_):
        file_paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        for file in file_paths[: len(file_paths) // 2]:
            file.unlink()

    class Half(type(shutil)):
        rmtree = staticmethod(counted(shutil.rmtree, half_removed))

    for module in (files, atomic):
        monkeypatch.setattr(module, "shutil", Half("shutil"))
    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))

    def set_to(n):
        calls_left[:] = [] if n is None else [n]

    return set_to


@pytest.mark.parametrize("same_step", [False, True], ids=["a new step", "a step that is there already"])
def test_a_kill_at_any_instant_leaves_whole_checkpoints_and_a_true_latest(same_step, tmp_path, killed_at):
    instants = 0
    for n in range(1000):
        run = tmp_path / str(n)
        killed_at(None)
        write(run, 1, quality=1.0)
        write(run, 2)
        killed_at(n)
        try:
            write(run, 2 if same_step else 3, mark=b"new")
            files.prune(run, 1)
            killed_at(None)
            break
        except Killed:
            instants += 1
        killed_at(None)
        files.recover(run)
        checkpoint_names = names(run)
        assert checkpoint_names[0] == "step_000001" and checkpoint_names[1] in ("step_000002", "step_000003")
        assert [files.verify(path) for path in files.list_checkpoints(run)] == [[]] * len(checkpoint_names)
        assert pointed(run, "latest") in checkpoint_names
        assert pointed(run, "best") in (None, "step_000001")
        assert {p.name for p in files.checkpoints_dir(run).iterdir() if p.is_dir()} == set(checkpoint_names)
    assert instants > 15
    assert names(run) == ["step_000001", "step_000002" if same_step else "step_000003"]
    assert (files.list_checkpoints(run)[-1] / "critic/common.pt").read_bytes().endswith(b"new")
