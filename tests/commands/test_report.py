"""`icegrt report RUN`: the report of a run from its metrics, at any time, and what it refuses."""

import pytest

from icegrt import cli
from icegrt.metrics import RewardStep, RunLog, SFTStep

SFT = {"epoch": 1.0, "tokens": 10, "tokens_per_second": 5.0, "lr": 1e-3, "grad_norm": 1.0}
REWARD = {"epoch": 1.0, "lr": 1e-3, "grad_norm": 1.0}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([SFTStep(step=n, loss=3.0 - n, heldout_loss=2.5 if n == 2 else None, **SFT) for n in (1, 2)], "2.500"),
        ([RewardStep(step=n, loss=0.7, accuracy=0.25 * n, **REWARD) for n in (1, 2)], "50.0%"),
    ],
    ids=["sft", "reward"],
)
def test_a_run_of_every_kind_has_a_page(steps, words, tmp_path, capsys):
    with RunLog(tmp_path / "run", tensorboard=False) as log:
        for step in steps:
            log.log(step)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out
    assert words in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected the folder of one run, got nothing"),
        (["one", "two"], "expected the folder of one run, got one two"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no PPO iteration and no training step"),
    ],
)
def test_what_is_no_run_is_refused(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_help_shows_the_usage(capsys):
    assert cli.main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: icegrt report RUN")
