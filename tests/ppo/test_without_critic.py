"""What surrounds a run builds, loads and plans no critic either: checkpoints, exports, adapters, offloading, plans."""

import json

import pytest
import torch

from icegrt import cli
from icegrt.config import LoRAConfig, OffloadConfig
from icegrt.errors import ConfigError
from icegrt.rehearsal.phases import ACTOR, CRITIC, PHASES
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny
from tests.helpers.rehearsals import rehearse_rank, small_config, write_model
from tests.helpers.tied_scores import tied_config, tied_trainer


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


class FailsOnce:
    """A callback that ends the run between scoring and update of an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_scores(self, run, experience):
        if run.done_steps + 1 == self.iteration:
            raise KeyboardInterrupt


@pytest.mark.parametrize("advantage", ["grpo", "reinforce++"])
def test_a_run_that_broke_off_resumes_to_the_same_metrics_and_weights(advantage, tmp_path):
    def config(name, **run):
        return tied_config(
            tmp_path / name, advantage=advantage, kl_coef=0.05, dynamic_sampling=True, prompts_per_iteration=3,
            checkpoint_every=2, run=run,
        )  # fmt: skip

    with tied_trainer(config("whole")) as run:
        run.train()
        expected = tiny.parameters(run.actor)
    with pytest.raises(KeyboardInterrupt), tied_trainer(config("part"), [FailsOnce(3)]) as run:
        run.train()
    with tied_trainer(config("part", resume=True)) as run:
        assert run.done_steps == 2
        run.train()
        assert tiny.same(tiny.parameters(run.actor), expected)
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    saved = json.loads((tmp_path / "part/checkpoints/step_000003/state.json").read_text())
    assert list(saved["roles"]) == ["actor"] and "value_loss" in metrics(tmp_path / "part")[0]


def test_another_set_of_roles_is_not_resumed_and_a_critic_not_exported(tmp_path):
    home = cases.make_home(tmp_path / "home")
    keys = cases.ppo_keys(home, tmp_path / "run", "ppo.advantage=rloo", "ppo.iterations=1")
    assert cli.main(["ppo", *keys]) == 0
    with pytest.raises(ConfigError, match=r"holds actor, but this run trains actor and critic \(ppo.advantage"):
        cli_or_error(["ppo", *keys, "ppo.advantage=gae", "ppo.iterations=2", "--resume"])
    with pytest.raises(ConfigError, match=r"export.role: .* holds actor, not critic \(an estimator other than gae"):
        cli_or_error(["export", f"export.run={tmp_path / 'run'}", "export.role=critic", f"export.out={tmp_path / 'o'}"])
    assert cli.main(["export", f"export.run={tmp_path / 'run'}", f"export.out={tmp_path / 'out'}"]) == 0


def cli_or_error(arguments):
    """Run a command with its errors as exceptions."""
    from icegrt.config import ExportConfig, PPOConfig

    command, *overrides = arguments
    overrides = ["ppo.run.resume=true" if o == "--resume" else o for o in overrides]
    if command == "ppo":
        from icegrt.ppo.trainer import run
    else:
        from icegrt.commands.export import run
    run((PPOConfig if command == "ppo" else ExportConfig).load(None, overrides))


def test_adapters_without_a_critic_are_those_of_the_actor_alone(tmp_path):
    folder = cases.save_model(tmp_path / "actor", tiny.causal_lm(0), tiny.tokenizer())
    from icegrt.ppo.trainer import PPOTrainer

    config = tied_config(tmp_path / "run", sharing="lora", lora=LoRAConfig(rank=4), iterations=1)
    with PPOTrainer(config, folder, None, tiny.count_letters, tiny.PROMPTS) as run:
        step = run.step()
        assert set(run.components.roles) == {"actor", "reference"} and run.critic is None
        assert step.grad_norm_actor > 0 and step.value_loss is None


@pytest.mark.parametrize("prefetch", [False, True])
def test_offloading_without_a_critic_changes_no_bit(prefetch, tmp_path):
    weights = []
    for offload in (OffloadConfig(), OffloadConfig(roles="all", prefetch=prefetch)):
        with tied_trainer(tied_config(tmp_path / str(len(weights)), offload=offload, iterations=2)) as run:
            list(run)
            weights.append(tiny.by_hugging_face_name(run.actor, lambda p: p))
    assert tiny.same(*weights)


@pytest.mark.parametrize("advantage", ["rloo", "reinforce++"])
def test_a_rehearsal_without_a_critic_has_neither_its_parameters_nor_its_steps(advantage, tmp_path):
    model = write_model(tmp_path / "model")
    keys = ("ppo.critic.init=actor", "ppo.offload.prefetch=true", "ppo.offload.roles=optimizer")
    with_critic = rehearse_rank(small_config(model, *keys), 0, 2)
    without = rehearse_rank(small_config(model, *keys, f"ppo.advantage={advantage}"), 0, 2)
    assert [name for name in PHASES if name not in without.watcher.phases] == [CRITIC]
    assert without.watcher.phases[ACTOR].product_flops == with_critic.watcher.phases[ACTOR].product_flops != {}
    assert 0.7 < without.parameters / with_critic.parameters < 0.8  # of four models one is gone
    assert without.watcher.device.peak().bytes < with_critic.watcher.device.peak().bytes


def test_tensorboard_and_readers_have_no_field_of_a_critic(tmp_path):
    with tied_trainer(tied_config(tmp_path / "run", iterations=1)) as run:
        run.train()
    row = metrics(tmp_path / "run")[-1]
    assert row["value_loss"] is None and row["lr_critic"] is None and row["zero_advantage_fraction"] > 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "ppo/policy_loss" in tags and not [t for t in tags if "critic" in t or "value" in t]
    assert torch.isfinite(torch.tensor(events.Scalars("ppo/policy_loss")[0].value))
