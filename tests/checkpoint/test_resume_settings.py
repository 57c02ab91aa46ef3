"""A run that is resumed with other settings takes them from there on; what cannot change is refused."""

import json

import pytest

from icegrt import cli
from icegrt.config import PPOConfig, SFTConfig
from icegrt.errors import DataError
from icegrt.metrics import read_metrics
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cases.make_home(tmp_path_factory.mktemp("home"))


def rows(run):
    return [row for row in read_metrics(run) if row["kind"] != "evaluation"]


def test_more_iterations_take_the_learning_rates_of_a_run_that_was_that_long(home, tmp_path):
    # At the end of the shorter run's schedule the rate would be zero: nothing more would be learnt, without a word.
    long, run = (cases.ppo_keys(home, tmp_path / name) for name in ("long", "run"))
    assert cli.main(["ppo", *long, "ppo.iterations=4"]) == 0
    assert cli.main(["ppo", *run, "ppo.iterations=2"]) == 0
    assert cli.main(["ppo", *run, "ppo.iterations=4", "--resume"]) == 0
    rates = [[row["lr_actor"] for row in rows(tmp_path / name)] for name in ("long", "run")]
    assert rates[1][2:] == rates[0][2:] and rates[0][2] > 0, rates


def test_settings_of_the_optimizer_and_of_the_loss_count_from_the_resume_on(home, tmp_path):
    keys = [*cases.ppo_keys(home, tmp_path / "run"), "ppo.optimizer.schedule=constant"]
    assert cli.main(["ppo", *keys]) == 0
    ptx = f"ppo.ptx_data=[{{path: {home.sft}}}]"
    changed = [
        *("ppo.iterations=4", "ppo.optimizer.lr=5e-4", "ppo.optimizer.beta2=0.5", "ppo.optimizer.weight_decay=0.25"),
        *("ppo.kl_coef=0.3", "ppo.ptx_coef=0.1", ptx, "ppo.run.resume=true"),
    ]
    with PPOTrainer(PPOConfig.load(None, [*keys, *changed])) as run:
        assert run.done_steps == 2
        row = run.step()
        groups = run.actor.optimizer.param_groups
    assert row.lr_actor == 5e-4 and row.kl_coef == 0.3 and row.ptx_loss > 0
    assert {group["betas"][1] for group in groups} == {0.5}
    assert {group["weight_decay"] for group in groups} - {0.0} == {0.25}  # norms and biases do not decay
    # What steers itself goes on from where it was, whatever it began with.
    steered = [*changed[:-1], "ppo.kl_control=adaptive", "ppo.kl_horizon_responses=100", "ppo.kl_coef=0.7"]
    with PPOTrainer(PPOConfig.load(None, [*keys, *steered, "ppo.run.resume=true"])) as run:
        assert run.components.kl_controller.coef == 0.3


def test_other_data_or_another_seed_is_refused(home, tmp_path):
    keys = [*cases.sft_keys(home, tmp_path / "run"), "sft.epochs=2"]
    assert cli.main(["sft", *keys]) == 0
    fewer = cases.write_jsonl(tmp_path / "fewer.jsonl", cases.sft_rows()[:5])
    for change in (f"sft.data=[{{path: {fewer}}}]", "sft.run.seed=9"):
        with pytest.raises(DataError, match="changed since the checkpoint"):
            SFTTrainer(SFTConfig.load(None, [*keys, change, "sft.run.resume=true"]))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())
