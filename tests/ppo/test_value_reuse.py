"""The critic's first step gives the values: the bits of an iteration with an inference pass, without that pass."""

import json
import math

import pytest
import torch

from icegrt import RewardResult
from icegrt.config import CriticConfig, OptimizerConfig, PPOConfig, RewardCallConfig
from icegrt.errors import RunError
from icegrt.metrics import calibration_path
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import step_metrics

pytestmark = pytest.mark.usefixtures("cluster")

ADAM = OptimizerConfig(lr=1e-2)
SETTINGS = {
    "defaults": {},
    "several passes of the critic": {"critic": CriticConfig(optimizer=ADAM, epochs=3), "ppo_epochs": 1},
    "two lambdas and a bootstrap": {"lam_policy": "adaptive", "lam_value": 0.9, "bootstrap_truncated": True},
    "turns": {"advantage_unit": "turn", "gamma": 0.9},
    "dropped responses": {"reward": RewardCallConfig(on_error="drop", workers=0)},
    "shared prompts": {"minibatch_by": "prompt", "token_budget": 32},
    "pretraining and warm-up": {
        "critic": CriticConfig(optimizer=ADAM, pretrain={"iterations": 1, "lr": 3e-3}, warmup_iterations=1, epochs=1),
        "kl_in": "loss",
    },
}


def token_rewards(samples):
    """Rewards by token; one response of each prompt has no score."""
    return [
        RewardResult(math.nan if s.index == 1 else len(set(s.tokens)) / 8, token_rewards_A=[t / 61 for t in s.tokens])
        for s in samples
    ]


class Recorder:
    """Experiences, and the critic's steps before them."""

    def __init__(self):
        self.experiences, self.steps_before = [], []

    def on_scores(self, run, experience):
        self.experiences.append(experience)
        self.steps_before.append(run.critic.weight_changes)


def open_run(folder, settings, callbacks=()):
    keys = {"minibatches": 1, "token_budget": 40, "iterations": 3, "checkpoint_every": 50} | settings
    reward = token_rewards if "reward" in settings else tiny.count_letters
    models = tiny.causal_lm(0), tiny.tokenizer(), [tiny.scorer(1), reward], tiny.PROMPTS
    return PPOTrainer(tiny.ppo_config(folder, **keys), *models, callbacks=callbacks)


def passes_of_the_critic(run, monkeypatch):
    """Return a list that grows with every inference pass of the critic."""
    passes, score = [], run.critic.score

    def counted(*args):
        passes.append(len(args[0]))
        return score(*args)

    monkeypatch.setattr(run.critic, "score", counted)
    return passes


@pytest.mark.parametrize("name", SETTINGS)
def test_metrics_weights_and_files_have_the_bits_of_a_run_with_the_inference_pass(name, tmp_path, monkeypatch):
    kept = []
    for reuses in (False, True):
        watch, folder = Recorder(), tmp_path / str(reuses)
        with open_run(folder, SETTINGS[name] | {"reuse_update_values": reuses}, [watch]) as run:
            passes = passes_of_the_critic(run, monkeypatch)
            steps = [run.step() for _ in range(2)]
            weights = [tiny.parameters(role) for role in run.roles]
            run.write_report()  # it waits for the rollouts' writer
        assert len(passes) == (0 if reuses else 2)
        assert all(len(e.plan.batches) > 1 for e in watch.experiences), "a return of one micro-batch needs no other"
        tables = [json.loads(calibration_path(folder, n).read_text()) for n in (1, 2)]
        rollouts = [path.read_bytes() for path in sorted((folder / "rollouts").iterdir())]
        kept.append(([step_metrics(s) for s in steps], weights, tables, rollouts, watch.steps_before))
    (steps, weights, tables, rollouts, before), (others, other_weights, other_tables, other_rollouts, after) = kept
    assert steps == others and tables == other_tables and rollouts == other_rollouts
    assert all(tiny.same(*pair) for pair in zip(weights, other_weights, strict=True))
    assert steps[0]["grad_norm_critic"] > 0 and len(rollouts) == 2
    # The hook sees the critic after its first step.
    assert after == [n + 1 for n in before]


def test_the_values_are_those_before_the_step(tmp_path):
    watch = Recorder()
    with open_run(tmp_path / "run", {"reuse_update_values": True, "critic": CriticConfig(optimizer=ADAM, epochs=1)},
                  [watch]) as run:  # fmt: skip
        before = tiny.parameters(run.critic)
        run.step()
        (experience,) = watch.experiences
        learned = tiny.parameters(run.critic)
        plan = experience.plan
        for name, parameter in run.critic.model.named_parameters():
            parameter.data.copy_(before[name])
        rows = run.critic.score(
            plan.batches,
            lambda hidden, batch: (run.critic.model.head(hidden[batch.action_rows_A]),),
            lambda batch: (batch.n_actions,),
        )
    assert torch.equal(experience.value_A, torch.cat([row[0] for row in rows]))
    assert not tiny.same(before, learned)


def test_a_value_that_is_no_number_ends_the_run_before_a_weight_changes(tmp_path):
    with open_run(tmp_path / "run", {"reuse_update_values": True}) as run:
        with torch.no_grad():
            run.critic.model.head.weight.fill_(math.inf)
        before = [tiny.parameters(role) for role in run.roles]
        with pytest.raises(RunError, match=r"iteration 1: the critic gives a value of .* weights are not finite"):
            run.step()
        assert all(tiny.same(tiny.parameters(role), old) for role, old in zip(run.roles, before, strict=True))


def test_the_pass_follows_from_the_configuration():
    assert PPOConfig().critic_is_inferred
    assert not PPOConfig(reuse_update_values=True, minibatches=1).critic_is_inferred
    assert not PPOConfig(advantage="rloo").critic_is_inferred
