"""Saving while training goes on, on SIGTERM, and onto a disk that is full."""

import json
import os
import resource
import shutil
import signal
import threading

import pytest
import torch

from icegrt import cli
from icegrt.checkpoint import directory as files
from icegrt.checkpoint.manager import write_bucket
from icegrt.config import PPOConfig, RewardConfig, SFTConfig
from icegrt.errors import CheckpointError, RunError
from icegrt.metrics import read_metrics
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training import run_folder as folders
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

STAGES = {
    "sft": (SFTTrainer, SFTConfig, cases.sft_keys),
    "reward": (RewardTrainer, RewardConfig, cases.reward_keys),
    "ppo": (PPOTrainer, PPOConfig, cases.ppo_keys),
}
LONGER = {
    "sft": ("sft.epochs=4", "sft.checkpoint_every=1"),
    "reward": ("reward.epochs=4", "reward.eval_every=1", "reward.patience=0"),
    "ppo": ("ppo.iterations=4", "ppo.checkpoint_every=3"),
}


def trainer(home, stage, folder, *keys, callbacks=()):
    kind, config, common = STAGES[stage]
    return kind(config.load(None, [*common(home, folder), *LONGER[stage], *keys]), callbacks=callbacks)


def names(run):
    return [p.name for p in files.list_checkpoints(run)]


def weights_of(run, name, home):
    """The actor in a checkpoint, exported."""
    out = run / f"exported_{name}"
    assert cli.main(["export", f"export.run={run}", f"export.checkpoint={name}", f"export.out={out}"]) == 0
    return (out / "model.safetensors").read_bytes()


def rows_without_clocks(run):
    timed = ("seconds", "per_second")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in read_metrics(run)]


# -- in the background -------------------------------------------------------------------------------------------------


class Gate:
    """Writes buckets of a checkpoint once it is open."""

    def __init__(self):
        self.opened = threading.Event()

    def open(self):
        self.opened.set()

    def write_bucket(self, *args):
        assert self.opened.wait(60)
        return write_bucket(*args)


def gated_trainer(gate, home, stage, folder, *keys):
    """A trainer that saves in the background, and not before `gate` is open."""
    run = trainer(home, stage, folder, f"{stage}.run.checkpoint_in_background=true", *keys)
    run.checkpoints.write_bucket = gate.write_bucket
    return run


def test_what_is_written_in_the_background_is_the_state_of_when_it_was_asked_for(home, tmp_path):
    keys = ("sft.checkpoint_every=0",)
    with trainer(home, "sft", tmp_path / "sync", *keys) as run:
        run.step()
        run.save_checkpoint()
    gate, committed = Gate(), []
    with gated_trainer(gate, home, "sft", tmp_path / "async", *keys) as run:
        run.callbacks.append(type("Hook", (), {"on_checkpoint": lambda self, run, path: committed.append(path.name)})())
        run.step()
        run.save_checkpoint()
        # Training goes on, and nothing can be taken for a checkpoint before it is one.
        run.step()
        assert names(run.dir) == [] and committed == [] and not (files.checkpoints_dir(run.dir) / "latest").exists()
        gate.open()
        run.complete_checkpoint()
        assert names(run.dir) == committed == ["step_000001"]
    for out, run in (("async", tmp_path / "async"), ("sync", tmp_path / "sync")):
        assert files.verify(files.checkpoint_path(run, 1)) == [], out
        assert json.loads((files.checkpoint_path(run, 1) / "state.json").read_text())["step"] == 1
    exported = [weights_of(tmp_path / kind, "latest", home) for kind in ("sync", "async")]
    assert exported[0] == exported[1]


def test_what_the_trainer_remembers_later_is_not_in_the_checkpoint(home, tmp_path):
    gate = Gate()
    with gated_trainer(gate, home, "ppo", tmp_path / "run") as run:
        run.step()
        run.save_checkpoint()
        before = json.loads(json.dumps(run.state()))
        run.step()
        run.alarm_messages.append("later")
        gate.open()
    assert files.read_state(files.checkpoint_path(run.dir, 1))["trainer"] == before


def test_a_run_that_saves_in_the_background_is_the_run_that_does_not(home, tmp_path):
    for kind in ("false", "true"):
        with trainer(home, "ppo", tmp_path / kind, f"ppo.run.checkpoint_in_background={kind}") as run:
            run.train()
        assert names(tmp_path / kind) == ["step_000003", "step_000004"]
    assert rows_without_clocks(tmp_path / "true") == rows_without_clocks(tmp_path / "false")
    states = [
        json.loads((files.checkpoint_path(tmp_path / kind, 3) / "state.json").read_text()) for kind in ("true", "false")
    ]
    assert states[0] == states[1]
    assert weights_of(tmp_path / "true", "step_000003", home) == weights_of(tmp_path / "false", "step_000003", home)


def test_a_pending_checkpoint_survives_an_error_of_the_run(home, tmp_path):
    gate = Gate()
    with pytest.raises(ZeroDivisionError):
        with gated_trainer(gate, home, "sft", tmp_path / "run") as run:
            run.step()
            assert names(run.dir) == []
            gate.open()
            raise ZeroDivisionError
    assert names(tmp_path / "run") == ["step_000001"]


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


class TermAt:
    """SIGTERM in the middle of what comes before this step is told."""

    def __init__(self, step):
        self.step = step

    def on_update(self, run, row):
        if run.done_steps == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_and_ends_with_status_0_and_the_run_goes_on_as_if_it_had_not(stage, home, tmp_path):
    with trainer(home, stage, tmp_path / "undisturbed") as run:
        run.train()
        total = run.done_steps
    auto = f"{stage}.run.resume=auto"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        with trainer(home, stage, tmp_path / "run", auto, callbacks=[TermAt(2)]) as run:
            run.train()
    assert ended.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert names(tmp_path / "run")[-1] == "step_000002" and total > 2
    with trainer(home, stage, tmp_path / "run", auto) as run:
        assert run.done_steps == 2
        run.train()
    assert rows_without_clocks(tmp_path / "run") == rows_without_clocks(tmp_path / "undisturbed")
    weights, expected = (
        (tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "undisturbed")
    )
    assert weights == expected


# -- resume=auto, and torchrun's restarts ------------------------------------------------------------------------------


def test_auto_starts_and_goes_on_with_one_command(home, tmp_path, monkeypatch):
    auto = ("ppo.run.resume=auto", f"ppo.eval_prompts={home.prompts}", "ppo.eval_limit=2")
    with trainer(home, "ppo", tmp_path / "undisturbed", *auto) as run:
        run.train()
    rollouts = tmp_path / "run" / "rollouts"
    for done_steps in (0, 0, 3):
        # Two attempts end before the first checkpoint, after an iteration each; the third after it.
        with trainer(home, "ppo", tmp_path / "run", *auto) as run:
            assert run.done_steps == 0 and (not rollouts.exists() or not list(rollouts.iterdir()))
            for _ in range(done_steps or 1):
                run.step()
    shutil.copytree(tmp_path / "run", tmp_path / "restarted")
    with trainer(home, "ppo", tmp_path / "run", *auto) as run:
        assert run.done_steps == 3
        run.train()
    assert rows_without_clocks(tmp_path / "run") == rows_without_clocks(tmp_path / "undisturbed")
    lines = [len((tmp_path / run / "metrics.jsonl").read_text().splitlines()) for run in ("run", "undisturbed")]
    assert lines == [5, 5]
    for path in rollouts.iterdir():
        assert path.read_bytes() == (tmp_path / "undisturbed" / "rollouts" / path.name).read_bytes()
    # The command need not say so where torchrun itself starts it again.
    with pytest.raises(RunError, match=r"holds an earlier run; continue it with ppo\.run\.resume=auto"):
        trainer(home, "ppo", tmp_path / "restarted")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with trainer(home, "ppo", tmp_path / "restarted") as run:
        assert run.done_steps == 3


def test_auto_does_not_take_a_folder_that_is_something_else(home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty, and not the folder of a run"):
        trainer(home, "ppo", tmp_path / "run", "ppo.run.resume=auto")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_run_in_one_folder(home, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_TIMEOUT_S", 0.2)
    with trainer(home, "sft", tmp_path / "run"):
        with pytest.raises(RunError, match="another process is running in it"):
            trainer(home, "sft", tmp_path / "run", "sft.run.resume=auto")
    with trainer(home, "sft", tmp_path / "run", "sft.run.resume=auto"):
        pass


# -- damage, in a run --------------------------------------------------------------------------------------------------


def test_a_run_names_a_damaged_checkpoint_and_goes_on_from_the_one_before(home, tmp_path, capsys):
    with trainer(home, "sft", tmp_path / "run", "sft.keep_checkpoints=9") as run:
        expected_summary = run.train()
    assert len(names(run.dir)) >= 4
    last, before = files.list_checkpoints(run.dir)[:-3:-1]
    data = last / "actor" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with trainer(home, "sft", tmp_path / "run", "sft.run.resume=true") as run:
        assert run.done_steps == int(before.name[5:])
        warned = capsys.readouterr().err
        assert f"{last}: damaged: actor/__0_0.distcp has" in warned and "the one before it" in warned
        assert run.train() == expected_summary
    assert last.name in names(run.dir) and (last.parent / f"{last.name}.damaged").is_dir()
    for path in files.list_checkpoints(run.dir):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing.*\n(.*\n)*.*no checkpoint is whole"):
        trainer(home, "sft", tmp_path / "run", "sft.run.resume=true")


def test_best_weights_that_were_damaged_meanwhile_are_refused(home, tmp_path):
    with trainer(home, "reward", tmp_path / "run") as run:
        for _ in range(3):
            run.step()
        best = files.best_of(files.list_checkpoints(run.dir))
        data = best / "reward" / "__0_0.distcp"
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
        with pytest.raises(CheckpointError, match=rf"{best.name}: damaged: reward/__0_0\.distcp has changed"):
            run.finish()
        assert not (run.dir / "model").exists()


def test_export_takes_the_last_whole_checkpoint_the_best_or_the_one_that_is_named(home, tmp_path, capsys):
    heldout_rows = [row | {"response": row["response"][::-1]} for row in cases.read_jsonl(home.sft)]
    config = SFTConfig.load(None, [*cases.sft_keys(home, tmp_path / "run"), *LONGER["sft"], "sft.eval_every=1",
                                   "sft.optimizer.lr=0.05", "sft.keep_checkpoints=2"])  # fmt: skip
    with SFTTrainer(config, heldout=heldout_rows) as run:
        run.train()
    losses = [row["heldout_loss"] for row in read_metrics(run.dir)]
    by_step = {name: weights_of(run.dir, name, home) for name in names(run.dir)}
    best = (files.checkpoints_dir(run.dir) / "best").read_text().strip()
    assert best == min(by_step) and losses[int(best[5:]) - 1] == min(x for x in losses if x is not None)
    assert weights_of(run.dir, "best", home) == by_step[best] != by_step[max(by_step)]
    keys = [f"export.run={run.dir}", f"export.out={tmp_path / 'out'}"]
    assert cli.main(["export", *keys, "export.checkpoint=step_000099"]) == 2
    assert "holds no checkpoint `step_000099`" in capsys.readouterr().err
    (files.list_checkpoints(run.dir)[-1] / "actor" / "__0_0.distcp").write_bytes(b"")
    assert weights_of(run.dir, "latest", home) == by_step[sorted(by_step)[-2]]
    assert "__0_0.distcp has 0 bytes" in capsys.readouterr().err
    assert cli.main(["export", *keys, f"export.checkpoint={max(by_step)}"]) == 2
    assert "__0_0.distcp has 0 bytes" in capsys.readouterr().err and not (tmp_path / "out").exists()


# -- a disk that is full -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Room for a part of the weights; for nothing at all, not even the few numbers that are no weights.
    ("background", "room"),
    [("false", 60_000), ("true", 60_000), ("false", 100)],
)
def test_a_disk_that_is_full_while_saving_costs_that_checkpoint_alone(background, room, home, tmp_path):
    keys = (f"sft.run.checkpoint_in_background={background}", "sft.checkpoint_every=0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with trainer(home, "sft", tmp_path / "run", *keys) as run:
        run.step()
        run.save_checkpoint()
        run.complete_checkpoint()
        run.step()
        # The system refuses to let any file grow beyond this, in the middle of a write, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(RunError, match=r"step_000002: the checkpoint cannot be written \(File too large\)"):
                run.save_checkpoint()
                run.complete_checkpoint()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {p.name for p in files.checkpoints_dir(run.dir).iterdir() if p.is_dir()} == {"step_000001"}
        assert files.verify(files.checkpoint_path(run.dir, 1)) == []
        # With room again the run goes on, and the next one is whole.
        run.save_checkpoint()
        run.complete_checkpoint()
        assert files.verify(files.checkpoint_path(run.dir, 2)) == []


def test_a_disk_that_is_full_while_anything_else_is_written_is_one_message(home, tmp_path, capsys):
    run = tmp_path / "run"
    keys = [*cases.ppo_keys(home, run), *LONGER["ppo"], "ppo.checkpoint_every=1", "ppo.run.resume=auto"]
    with trainer(home, "ppo", run, "ppo.checkpoint_every=1") as first:
        first.step()
        first.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (run / "metrics.jsonl").stat().st_size + 500  # not enough for another row
    assert (run / "config.yaml").stat().st_size < room
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        assert cli.main(["ppo", *keys]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stderr = capsys.readouterr().err
    (error,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert "metrics.jsonl: cannot be written (File too large)" in error and "Traceback" not in stderr
    assert names(run) == ["step_000001", "step_000002"] and files.verify(files.checkpoint_path(run, 2)) == []
    assert cli.main(["ppo", *keys]) == 0 and names(run)[-1] == "step_000004"


def test_generators_of_python_numpy_and_torch_come_back(home, tmp_path):
    import random

    import numpy as np

    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with trainer(home, "sft", tmp_path / "run") as run:
        run.step()
        assert names(run.dir) == ["step_000001"]
        expected = drawn()
    tiny.causal_lm(5)
    with trainer(home, "sft", tmp_path / "run", "sft.run.resume=true"):
        assert drawn() == expected
