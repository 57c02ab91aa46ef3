"""Value pretraining in a PPO run: the actor rests, returns are of lambda 1, and the explained variance ends it."""

import json

import pytest
import torch

from icegrt.config import CriticConfig, OptimizerConfig, PPOConfig
from icegrt.errors import ConfigError
from icegrt.metrics import calibration_path, read_metrics
from icegrt.metrics.statistics import explained_variance
from icegrt.ppo.pretraining import ValuePretraining
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny
from tests.helpers.kernel_cases import naive_gae


def trainer(home, run, *overrides, callbacks=()):
    return PPOTrainer(PPOConfig.load(None, cases.ppo_keys(home, run, *overrides)), callbacks=callbacks)


class Recorder:
    def __init__(self):
        self.experiences = []

    def on_scores(self, run, experience):
        self.experiences.append(experience)


def pretraining(iterations, patience):
    critic = CriticConfig(pretrain={"iterations": iterations, "patience": patience})
    return ValuePretraining(PPOConfig(critic=critic))


def counted(plan, figures):
    """Return after how many iterations with these explained variances pretraining is over."""
    for number, figure in enumerate(figures, 1):
        plan._observe(figure)
        if plan.is_over:
            return number
    return None


def test_pretraining_ends_when_the_explained_variance_has_not_risen():
    assert counted(pretraining(10, 2), [0.1, 0.3, 0.2, 0.3, 0.9]) == 4
    assert counted(pretraining(10, 2), [0.1, 0.3, 0.2, 0.4, 0.3, 0.2]) == 6
    assert counted(pretraining(3, 0), [0.3, 0.2, 0.1]) == 3
    assert pretraining(0, 3).is_over


def test_the_actor_rests_and_returns_are_monte_carlo(home, tmp_path):
    watch = Recorder()
    keys = ("ppo.critic.pretrain.iterations=2", "ppo.critic.pretrain.patience=0", "ppo.gamma=0.9")
    with trainer(home, tmp_path / "run", *keys, callbacks=[watch]) as run:
        actor, critic = tiny.parameters(run.actor), tiny.parameters(run.critic)
        first = run.step()
        assert tiny.same(tiny.parameters(run.actor), actor) and first.pretraining
        assert not torch.equal(tiny.parameters(run.critic)["head.weight"], critic["head.weight"])
        assert first.grad_norm_actor == 0 and first.lr_critic == 1e-3
        assert run.total_steps == 4 and run.step().pretraining
        assert tiny.same(tiny.parameters(run.actor), actor)
        third = run.step()
        assert not third.pretraining and third.grad_norm_actor > 0
        assert not tiny.same(tiny.parameters(run.actor), actor)
        run.train()
        assert run.done_steps == 4
    for experience, lam in zip(watch.experiences, (1.0, 1.0, 0.95, 0.95), strict=True):
        plan, shaped = experience.plan, experience.shaped
        _, expected, _, _ = naive_gae(
            experience.scores.total_N,
            experience.value_A,
            experience.old_logprob_A,
            experience.ref_logprob_A,
            plan.cu_actions,
            kl_coef=0.05,
            gamma=0.9,
            lam=lam,
        )
        torch.testing.assert_close(shaped.return_A.double(), expected, rtol=1e-5, atol=1e-5)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "ppo"]
    assert [row["pretraining"] for row in rows] == [True, True, False, False]
    recorded = [json.loads(calibration_path(tmp_path / "run", n).read_text())["pretraining"] for n in range(1, 5)]
    assert recorded == [True, True, False, False]
    experience = watch.experiences[1]
    figure = explained_variance(experience.value_A.numpy(), experience.shaped.return_A.numpy())
    assert rows[1]["value_explained_variance"] == pytest.approx(figure, abs=1e-6)


def test_pretraining_resumes_to_the_bit_wherever_it_stops(home, tmp_path):
    keys = ("ppo.critic.pretrain.iterations=3", "ppo.critic.pretrain.patience=1", "ppo.kl_control=adaptive")
    keys = (*keys, "ppo.kl_horizon_responses=100", "ppo.critic.warmup_iterations=1", "ppo.iterations=2")
    with trainer(home, tmp_path / "whole", *keys) as run:
        run.train()
        total = run.total_steps
        expected = tiny.parameters(run.actor), tiny.parameters(run.critic), run.state()
    for stop in range(1, total):
        with trainer(home, tmp_path / f"at_{stop}", *keys) as run:
            for _ in range(stop):
                run.step()
        with trainer(home, tmp_path / f"at_{stop}", *keys, "ppo.run.resume=true") as run:
            assert run.done_steps == stop
            run.train()
            assert run.total_steps == total
            assert tiny.same(tiny.parameters(run.actor), expected[0])
            assert tiny.same(tiny.parameters(run.critic), expected[1])
            assert run.state() == expected[2]


@pytest.mark.parametrize("is_older_checkpoint", [False, True])
def test_a_run_that_began_without_pretraining_refuses_it(is_older_checkpoint):
    saved = None if is_older_checkpoint else pretraining(0, 3).state()
    with pytest.raises(ConfigError, match=r"pretrain\.iterations is 2, but .* began without .* Set it to 0"):
        pretraining(2, 3).load_state(saved)
    # Pretraining that is over stays so, and an estimator without a critic has none.
    plan = pretraining(2, 3)
    assert counted(plan, [0.1, 0.2]) == 2
    for resumed in (pretraining(5, 3), plan):
        resumed.load_state(plan.state())
        assert resumed.is_over
    ValuePretraining(PPOConfig(advantage="rloo", critic=CriticConfig(pretrain={"iterations": 2}))).load_state(saved)


def test_the_schedule_of_the_critic_starts_after_pretraining(home, tmp_path):
    keys = ("ppo.critic.pretrain.iterations=1", "ppo.critic.pretrain.lr=2e-3", "ppo.critic.optimizer.schedule=linear")
    with trainer(home, tmp_path / "run", *keys) as run:
        assert run.step().lr_critic == 2e-3
        assert run.critic.optimizer.param_groups[0]["lr"] == 1e-3
    with trainer(home, tmp_path / "other") as run:
        expected = run.step().lr_critic
    with trainer(home, tmp_path / "run", *keys, "ppo.run.resume=true") as run:
        assert run.step().lr_critic == expected


def test_a_pretrained_critic_starts_ppo_with_more_explained_variance(tmp_path):
    def first_step(iterations):
        critic = CriticConfig(
            init="actor",
            optimizer=OptimizerConfig(lr=3e-3, schedule="constant"),
            pretrain={"iterations": iterations, "patience": 0},
        )
        config = tiny.ppo_config(
            tmp_path / str(iterations), critic=critic, prompts_per_iteration=10, samples_per_prompt=16, token_budget=512
        )
        with PPOTrainer(config, tiny.causal_lm(), tiny.tokenizer(), tiny.count_letters, tiny.PROMPTS) as run:
            rows = [run.step() for _ in range(iterations + 1)]
        assert not rows[-1].pretraining
        return rows[-1].value_explained_variance

    untrained, pretrained = first_step(0), first_step(8)
    assert untrained == pytest.approx(0.0, abs=1e-6)  # the zero head says nothing
    assert pretrained > 0.1
