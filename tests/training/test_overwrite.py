"""`run.overwrite`: what it replaces, what it leaves, and that no start loses an earlier run; the saved config.yaml."""

import pytest

from icegrt.checkpoint.directory import list_checkpoints
from icegrt.config import PPOConfig, SFTConfig
from icegrt.errors import ConfigError, DataError, RunError
from icegrt.training.overwrite import move_aside
from icegrt.training.run_folder import lock_run_folder
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases


def config(home, folder, *keys):
    return SFTConfig.load(None, cases.sft_keys(home, folder, *(f"sft.{key}" for key in keys)))


def train(home, folder, *keys, **inputs):
    with SFTTrainer(config(home, folder, *keys), **inputs) as run:
        run.train()


@pytest.fixture
def earlier(home, tmp_path):
    """The folder of a finished run, with a file of the user's."""
    train(home, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_used_folder_is_refused_with_both_remedies(home, earlier):
    with pytest.raises(RunError, match=r"continue it with sft\.run\.resume=auto, replace it with sft\.run\.overwrite"):
        lock_run_folder(config(home, earlier))


def test_overwrite_starts_anew_and_leaves_the_users_files(home, earlier):
    (earlier / "checkpoints" / "step_000009").mkdir()
    train(home, earlier, "run.overwrite=true", "epochs=2")
    assert [path.name for path in list_checkpoints(earlier)] == ["step_000004"]
    assert (earlier / "notes.txt").read_text() == "mine" and not (earlier / ".replaced").exists()
    saved = SFTConfig.load(earlier / "config.yaml")
    assert saved.epochs == 2 and not saved.run.overwrite and not (earlier / "config.1.yaml").exists()


def test_a_start_that_fails_leaves_the_earlier_run_as_it_was(home, earlier):
    before = tree(earlier)
    with pytest.raises(DataError):
        SFTTrainer(config(home, earlier, "run.overwrite=true", "data=[{path: nowhere.jsonl}]"))
    assert tree(earlier) == before


@pytest.mark.parametrize("had_begun", [False, True])
def test_a_start_that_was_killed_leaves_one_whole_run(had_begun, home, earlier):
    before = tree(earlier)
    move_aside(earlier)
    if had_begun:
        config(home, earlier).save(earlier / "config.yaml")
    lock_run_folder(config(home, earlier, "run.resume=auto")).release()
    assert not (earlier / ".replaced").exists()
    assert set(tree(earlier)) == {"config.yaml", "notes.txt"} if had_begun else tree(earlier) == before


def test_ranks_that_torchrun_restarts_do_not_overwrite_their_own_run(home, earlier, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with SFTTrainer(config(home, earlier, "run.overwrite=true")) as run:
        assert run.done_steps == 2
    # Before the new run had begun they still replace the earlier one.
    move_aside(earlier)
    with SFTTrainer(config(home, earlier, "run.overwrite=true")) as run:
        assert run.done_steps == 0


def test_overwrite_and_resume(home, earlier):
    with pytest.raises(ConfigError, match=r"sft\.run\.overwrite and sft\.run\.resume .* contradict"):
        lock_run_folder(config(home, earlier, "run.overwrite=true", "run.resume=true"))
    with SFTTrainer(config(home, earlier, "run.overwrite=true", "run.resume=auto")) as run:
        assert run.done_steps == 2


@pytest.mark.parametrize("path", ["{run}/model", "{run}", "{run}/checkpoints/../model"])
def test_a_run_does_not_overwrite_its_own_input(path, home, earlier):
    before = tree(earlier)
    model = path.format(run=earlier)
    with pytest.raises(RunError, match=r"sft\.run\.overwrite: the new run reads .*, which would be replaced"):
        lock_run_folder(config(home, earlier, "run.overwrite=true", f"model={model}"))
    with pytest.raises(RunError, match=r"sft\.run\.overwrite: the new run reads"):
        SFTTrainer(config(home, earlier, "run.overwrite=true"), model=model)
    keys = cases.ppo_keys(home, earlier, f"ppo.reward_function={earlier}/model/config.json:f", "ppo.run.overwrite=true")
    with pytest.raises(RunError, match=r"ppo\.run\.overwrite: the new run reads"):
        lock_run_folder(PPOConfig.load(None, keys))
    assert tree(earlier) == before


def test_a_folder_of_something_else_is_not_overwritten(home, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(RunError, match="not the folder of a run"):
        lock_run_folder(config(home, tmp_path / "run", "run.overwrite=true"))


def test_the_saved_configuration_repeats_the_run_and_earlier_ones_are_kept(home, earlier):
    first = (earlier / "config.yaml").read_text()
    train(home, earlier, "run.resume=true")
    assert (earlier / "config.yaml").read_text() == first and not (earlier / "config.1.yaml").exists()
    train(home, earlier, "run.resume=true", "epochs=2")
    train(home, earlier, "run.resume=auto", "epochs=3")
    assert (earlier / "config.1.yaml").read_text() == first
    assert [SFTConfig.load(earlier / f"config{n}.yaml").epochs for n in ("", ".2", ".1")] == [3, 2, 1]
    assert SFTConfig.load(earlier / "config.yaml").run.resume is False
