"""A run that fails inside a step keeps its last whole step, says what is kept, and resumes to the undisturbed bits."""

import json
import subprocess
import sys

import pytest

from icegrt import cli
from icegrt.config import PPOConfig, RewardConfig, SFTConfig
from icegrt.errors import RunError, note_of
from icegrt.metrics import read_metrics
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases

# Of each stage: configuration, trainer, keys of a run of a few steps without a checkpoint before the last, and the role
# that trains first.
STAGES = {
    "sft": (SFTConfig, SFTTrainer, cases.sft_keys, ("sft.epochs=2",)),
    "reward": (RewardConfig, RewardTrainer, cases.reward_keys, ("reward.epochs=2", "reward.eval_every=100")),
    "ppo": (PPOConfig, PPOTrainer, cases.ppo_keys, ("ppo.iterations=4", "ppo.checkpoint_every=100")),
}


class CallbackError(Exception):
    pass


class FailsAfter:
    """A callback of the user that raises when `step` steps are done."""

    def __init__(self, step):
        self.step = step

    def on_update(self, run, row):
        if run.done_steps == self.step:
            raise CallbackError("the dashboard is down")


def open_run(stage, home, folder, *keys, **inputs):
    config, trainer, stage_keys, settings = STAGES[stage]
    overrides = [*settings, *(f"{stage}.{key}" for key in keys)]
    return trainer(config.load(None, stage_keys(home, folder, *overrides)), **inputs)


def fail_before_the_update(run, monkeypatch, step):
    """The step after `step` steps fails when it has read its data, before a weight changes."""
    accumulate = run.roles[0].accumulate

    def failing(work):
        if run.done_steps == step:
            raise OSError("the data cannot be read")
        return accumulate(work)

    monkeypatch.setattr(run.roles[0], "accumulate", failing)


def fail_within_the_update(run, monkeypatch, step):
    """The step after `step` steps fails when the optimizer has changed weights."""
    advance = run.roles[0].schedule.step

    def failing(increment):
        advance(increment=increment)
        if run.done_steps == step:
            raise OSError("the device is lost")

    monkeypatch.setattr(run.roles[0].schedule, "step", failing)


def outcome(folder):
    timed = ("seconds", "per_second")
    rows = [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in read_metrics(folder)]
    rollouts = {path.name: path.read_bytes() for path in sorted((folder / "rollouts").glob("*"))}
    return repr(rows), rollouts, (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """The outcome of each stage's run without a failure."""
    outcomes = {}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp("undisturbed") / stage
        with open_run(stage, home, folder) as run:
            run.train()
        outcomes[stage] = outcome(folder)
    return outcomes


@pytest.mark.parametrize("where", ["before the update", "in a callback"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_run_saves_its_last_whole_step_and_resumes_to_the_same_bits(
    stage, where, home, undisturbed, tmp_path, monkeypatch
):
    folder, inputs = tmp_path / "run", {"callbacks": [FailsAfter(2)]} if where == "in a callback" else {}
    with pytest.raises((OSError, CallbackError)) as failed:
        with open_run(stage, home, folder, **inputs) as run:
            if not inputs:
                fail_before_the_update(run, monkeypatch, 2)
            run.train()
    unit = "iterations" if stage == "ppo" else "steps"
    assert note_of(failed.value) == (
        f"kept: 2 of 4 {unit}, in {folder / 'checkpoints' / 'step_000002'}; continue with --resume"
    )
    monkeypatch.undo()
    with open_run(stage, home, folder, "run.resume=true") as run:
        assert run.done_steps == 2
        run.train()
    assert outcome(folder) == undisturbed[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_fails_halfway_is_not_saved(stage, home, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="the device is lost") as failed:
        with open_run(stage, home, folder) as run:
            run.step()
            run.save_checkpoint()
            fail_within_the_update(run, monkeypatch, 2)
            run.train()
    assert [path.name for path in sorted((folder / "checkpoints").glob("step_*"))] == ["step_000001"]
    note = note_of(failed.value)
    assert "kept: 1 of 4" in note and "(2 were done)" in note and note.endswith("continue with --resume")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_fails_in_its_first_step_names_the_command_that_starts_it_again(stage, home, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(OSError) as failed:
        with open_run(stage, home, folder) as run:
            fail_before_the_update(run, monkeypatch, 0)
            run.train()
    assert note_of(failed.value).startswith("kept: no checkpoint, after 0 of 4")
    assert note_of(failed.value).endswith(f"start again with {stage}.run.resume=auto")
    assert not (folder / "checkpoints").exists()
    monkeypatch.undo()
    with open_run(stage, home, folder, "run.resume=auto") as run:
        assert run.done_steps == 0


def test_the_command_prints_what_is_kept_below_the_error(home, tmp_path, capfd):
    (tmp_path / "score.py").write_text(
        "calls = []\n\n"
        "def fails_in_iteration_3(samples):\n"
        "    calls.append(samples)\n"
        "    if len(calls) == 4:\n"  # the first call is the probe before training
        "        raise ValueError('the judge is out')\n"
        "    return [0.5] * len(samples)\n"
    )
    function = f"ppo.reward_function={tmp_path / 'score.py'}:fails_in_iteration_3"
    keys = cases.ppo_keys(home, tmp_path / "run", *STAGES["ppo"][3], function, "ppo.reward.workers=0")
    assert cli.main(["ppo", *keys]) == 2
    error, note = capfd.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: iteration 3: ") and "the judge is out" in error
    assert note == f"kept: 2 of 4 iterations, in {tmp_path / 'run/checkpoints/step_000002'}; continue with --resume"


def test_weights_after_skipped_steps_are_not_saved(home, tmp_path):
    keys = ("optimizer.lr=1e19", "optimizer.clip_grad=0", "optimizer.warmup_fraction=0", "epochs=8")
    with pytest.raises(RunError, match="3 optimizer steps in a row") as failed:
        with open_run("sft", home, tmp_path / "run", *keys) as run:
            run.train()
    assert not (tmp_path / "run" / "checkpoints").exists() and "kept: no checkpoint" in note_of(failed.value)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_step_beyond_the_last_is_refused(stage, home, tmp_path):
    with open_run(stage, home, tmp_path / "run", "epochs=1") as run:
        list(run)
        with pytest.raises(RunError, match=rf"all 2 steps are done; raise {stage}\.epochs"):
            run.step()


# -- a full disk -------------------------------------------------------------------------------------------------------


def on_a_full_disk(home, folder, first, last, *keys):
    """Run PPO with a disk that is full from iteration `first` to `last`. Returns its exit status and stderr."""
    arguments = [str(first), str(last), *cases.ppo_keys(home, folder, *STAGES["ppo"][3], *keys)]
    command = [sys.executable, "-m", "tests.helpers.full_disk", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stderr.splitlines()


def test_a_full_disk_costs_rollouts_and_one_warning_each_and_the_metrics_follow(home, undisturbed, tmp_path):
    folder = tmp_path / "run"
    status, stderr = on_a_full_disk(home, folder, 2, 3)
    assert status == 0, stderr
    warnings = [line for line in stderr if line.startswith("warning: ") and "File too large" in line]
    assert sum("iteration_00002.jsonl: not written" in line for line in warnings) == 1
    assert not any("iteration_00003" in line for line in warnings)
    assert sum("metrics.jsonl: rows wait in memory" in line for line in warnings) == 1
    written = sorted(path.name for path in (folder / "rollouts").iterdir())
    assert written == ["iteration_00001.jsonl", "iteration_00004.jsonl"]
    rows, _, weights = outcome(folder)
    assert (rows, weights) == (undisturbed["ppo"][0], undisturbed["ppo"][2])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_earlier_one(home, tmp_path):
    folder = tmp_path / "run"
    status, stderr = on_a_full_disk(home, folder, 3, 99, "ppo.checkpoint_every=1")
    assert status == 1
    assert f"error: {folder / 'metrics.jsonl'}: cannot be written (File too large), so no checkpoint" in stderr[-2]
    assert stderr[-1].startswith("kept: 2 of 4 iterations (3 were done)")
    with open_run("ppo", home, folder, "run.resume=true") as run:
        assert run.done_steps == 2
        run.train()
    assert [row["iteration"] for row in read_metrics(folder)] == [1, 2, 3, 4]
