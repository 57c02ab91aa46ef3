"""Callbacks: when each hook is called, what it is given, and that an object needs only those it wants."""

import pytest

import icegrt
from icegrt.ppo.experience import Experience
from tests.helpers import stage_cases as cases


class Recorder(icegrt.Callback):
    def __init__(self):
        self.calls = []

    def on_rollout(self, trainer, responses):
        self.calls.append(("rollout", trainer.done_steps, responses))

    def on_scores(self, trainer, experience):
        self.calls.append(("scores", trainer.done_steps, experience))

    def on_update(self, trainer, step):
        self.calls.append(("update", trainer.done_steps, step))

    def on_checkpoint(self, trainer, path):
        self.calls.append(("checkpoint", trainer.done_steps, path))


def test_ppo_calls_every_hook_in_the_order_of_the_loop(home, tmp_path):
    recorder = Recorder()
    config = icegrt.PPOConfig.load(None, cases.ppo_keys(home, tmp_path / "run", "ppo.checkpoint_every=2"))
    with icegrt.PPOTrainer(config, callbacks=[icegrt.Callback(), recorder]) as trainer:
        steps = list(trainer)
    rollout_hooks = [("rollout", 0), ("scores", 0), ("update", 1)]
    assert [call[:2] for call in recorder.calls] == [
        *rollout_hooks,
        ("rollout", 1),
        ("scores", 1),
        ("checkpoint", 2),
        ("update", 2),
    ]
    arguments = {name: argument for name, _, argument in recorder.calls}
    assert len(arguments["rollout"]) == 8 and isinstance(arguments["rollout"][0], icegrt.Response)
    assert isinstance(arguments["scores"], Experience) and arguments["scores"].scores.total_N.shape == (8,)
    assert arguments["update"] is steps[-1]
    assert arguments["checkpoint"] == tmp_path / "run" / "checkpoints" / "step_000002"


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_sft_and_reward_call_update_and_checkpoint(home, tmp_path, stage):
    recorder = Recorder()
    kind, config, keys = {
        "sft": (icegrt.SFTTrainer, icegrt.SFTConfig, cases.sft_keys),
        "reward": (icegrt.RewardTrainer, icegrt.RewardConfig, cases.reward_keys),
    }[stage]
    with kind(config.load(None, keys(home, tmp_path / "run")), callbacks=[recorder]) as trainer:
        trainer.train()
    names = [name for name, _, _ in recorder.calls]
    assert names.count("update") == 2 and names[-1] == "checkpoint" and set(names) == {"update", "checkpoint"}


def test_an_object_needs_only_the_hooks_it_wants(home, tmp_path):
    class Stopper:
        def on_update(self, trainer, step):
            trainer.total_steps = trainer.done_steps

    config = icegrt.PPOConfig.load(None, cases.ppo_keys(home, tmp_path / "run", "ppo.iterations=50"))
    with icegrt.PPOTrainer(config, callbacks=[Stopper()]) as trainer:
        assert [step.iteration for step in trainer] == [1]


def test_an_error_in_a_callback_is_the_users_to_see(home, tmp_path):
    class Broken:
        def on_rollout(self, trainer, responses):
            raise KeyError("mine")

    config = icegrt.PPOConfig.load(None, cases.ppo_keys(home, tmp_path / "run"))
    with icegrt.PPOTrainer(config, callbacks=[Broken()]) as trainer, pytest.raises(KeyError, match="mine"):
        trainer.step()
