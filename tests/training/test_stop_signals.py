"""Signals that end a run: one saves and ends after the step, a second one leaves at once; messages that are true."""

import os
import signal
import subprocess
import sys

import pytest

from icegrt.config import RewardConfig, SFTConfig
from icegrt.errors import RunError
from icegrt.metrics import read_metrics
from icegrt.training import stop_signals
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.run_folder import lock_run_folder
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases

DIVERGES = ("optimizer.lr=1e19", "optimizer.clip_grad=0", "optimizer.warmup_fraction=0", "epochs=8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cases.make_home(tmp_path_factory.mktemp("home"))


def sft(home, run, *keys, **inputs):
    return SFTTrainer(SFTConfig.load(None, cases.sft_keys(home, run, *(f"sft.{key}" for key in keys))), **inputs)


class SignalAt:
    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_update(self, run, row):
        if run.done_steps == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", stop_signals.STOP_SIGNALS)
def test_every_stop_signal_saves_and_ends_with_status_0(number, home, tmp_path, capfd):
    before = {n: signal.getsignal(n) for n in stop_signals.STOP_SIGNALS}
    with pytest.raises(SystemExit) as ended:
        with sft(home, tmp_path / "run", "epochs=4", callbacks=[SignalAt(3, number)]) as run:
            run.train()
    assert ended.value.code == 0
    assert {n: signal.getsignal(n) for n in stop_signals.STOP_SIGNALS} == before
    assert (tmp_path / "run" / "checkpoints" / "step_000003" / "manifest.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    out, err = capfd.readouterr()
    assert f"{number.name}: saved after 3 of 8 steps" in out
    assert f"{number.name}: saving after this step" in err


def test_a_signal_that_a_launcher_repeats_is_one_request(home, tmp_path):
    with pytest.raises(SystemExit):
        with sft(home, tmp_path / "run", callbacks=[SignalAt(1, signal.SIGINT, signal.SIGTERM)]) as run:
            run.train()
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()


def test_a_second_ctrl_c_leaves_at_once(home, tmp_path, monkeypatch):
    monkeypatch.setattr(stop_signals, "SAME_REQUEST_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        with sft(home, tmp_path / "run", callbacks=[SignalAt(1, signal.SIGINT, signal.SIGINT)]) as run:
            run.train()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_sigterm_ends_the_process():
    code = (
        "import os, signal\n"
        "from icegrt.training import stop_signals\n"
        "stop_signals.SAME_REQUEST_S = -1.0\n"
        "with stop_signals.capture_stop_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGTERM and ended.stdout == ""


# -- messages of a run folder, and of a resumed run --------------------------------------------------------------------


def test_a_run_without_a_checkpoint_names_the_key_that_starts_it_again(home, tmp_path):
    with sft(home, tmp_path / "run"):
        pass
    for resume in ("false", "true"):
        config = SFTConfig.load(None, cases.sft_keys(home, tmp_path / "run", f"sft.run.resume={resume}"))
        with pytest.raises(RunError, match="resume=auto"):
            lock_run_folder(config)
    with sft(home, tmp_path / "run", "run.resume=auto") as run:
        assert run.done_steps == 0


def test_a_resumed_run_that_is_longer_than_its_configuration_says_so(home, tmp_path, capsys):
    with sft(home, tmp_path / "run", "epochs=2") as run:
        run.train()
    with sft(home, tmp_path / "run", "run.resume=true") as run:
        assert list(run) == []
    assert "all 2 steps of this configuration are done; raise sft.epochs" in capsys.readouterr().err


# -- divergence, ties, and the held-out loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_run_that_diverges_ends_and_exports_nothing(stage, home, tmp_path):
    keys = [f"{stage}.{key}" for key in DIVERGES]
    if stage == "sft":
        run = SFTTrainer(SFTConfig.load(None, cases.sft_keys(home, tmp_path / "run", *keys)))
    else:
        keys.append("reward.patience=0")
        run = RewardTrainer(RewardConfig.load(None, cases.reward_keys(home, tmp_path / "run", *keys)))
    with pytest.raises(RunError, match=r"3 optimizer steps in a row of the (actor|reward) had a loss or gradient"), run:
        run.train()
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "report.html").is_file()  # a failed run has one too


def test_weights_that_are_not_finite_are_not_exported(home, tmp_path):
    with sft(home, tmp_path / "run", "epochs=1") as run:
        list(run)
        next(run.role.model.parameters()).data.view(-1)[0] = float("nan")
        with pytest.raises(RunError, match="weights of the actor are not finite"):
            run.finish()
    assert not (tmp_path / "run" / "model").exists()


def test_equal_scores_are_half_right_in_training_as_in_evaluation(home, tmp_path):
    with RewardTrainer(RewardConfig.load(None, cases.reward_keys(home, tmp_path / "run"))) as run:
        assert run.evaluate().accuracy == run.step().accuracy == 0.5  # the new head is zero


def test_the_last_step_of_sft_has_the_held_out_loss(home, tmp_path):
    with sft(home, tmp_path / "run") as run:
        summary = run.train()
    rows = read_metrics(tmp_path / "run")
    assert [row["heldout_loss"] for row in rows] == [None, summary["heldout_loss_after"]]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "held-out loss" in page and (tmp_path / "run" / "curves.png").stat().st_size > 0
