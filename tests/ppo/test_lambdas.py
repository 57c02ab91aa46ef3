"""Two lambdas, one lambda per response, and turns: from the configuration to the losses."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.config import PPOConfig, SamplingConfig
from icegrt.errors import ConfigError
from icegrt.kernels import available_backends, use_backend
from icegrt.ppo.advantages.lambdas import adaptive_lambda
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.estimator_keys import check_estimator
from icegrt.ppo.experience import Experience, compute_advantages
from icegrt.ppo.losses import CriticLoss
from icegrt.ppo.pretraining import ValuePretraining
from icegrt.ppo.scores import Scores
from icegrt.ppo.trainer import PPOTrainer
from icegrt.ppo.update import Updater
from icegrt.rollout.types import Response
from tests.helpers import tiny_models as tiny
from tests.helpers.kernel_cases import naive_gae, worst

# Triton's recursion is tested against the same loop in tests/kernels/triton/test_shaped_gae.py.
BACKENDS = [backend for backend in available_backends("shaped_gae") if backend != "triton"]
CASES = {
    "one lambda": {"lam": 0.7},
    "policy": {"lam_policy": 0.7},
    "value": {"lam_value": 1.0},
    "both": {"lam_policy": 0.6, "lam_value": 0.9, "gamma": 0.9},
    "adaptive": {"lam_policy": "adaptive", "lam_alpha": 0.4},
    "adaptive and value": {"lam_policy": "adaptive", "lam_alpha": 0.4, "lam_value": 1.0, "bootstrap_truncated": True},
    "turns": {"advantage_unit": "turn"},
    "turns with two lambdas": {"advantage_unit": "turn", "lam_policy": 0.5, "lam_value": 1.0, "gamma": 0.9},
}


def masked_plan(lengths, masks):
    """A plan of responses whose tool tokens are masked: `masks` has a list of bools for each response."""
    responses = [Response(n, 0, n, [5, 6], [7] * x, [-1.0] * x, "length" if n % 2 else "stop")
                 for n, x in enumerate(lengths)]  # fmt: skip
    plan = plan_batches(responses, 24, 2)
    (order,) = plan.rank_assignment
    masks = iter([masks[n] for n in order])
    batches = [
        replace(b, action_mask_A=torch.tensor([x for _ in range(b.n_sequences) for x in next(masks)], dtype=torch.bool))
        for b in plan.batches
    ]
    return replace(plan, batches=batches)


def shaped_by(config, plan, seed=0):
    """What `compute_advantages` returned, and the oracle's advantages, returns, rewards and KL."""
    generator = torch.Generator().manual_seed(seed)
    size, count = int(plan.cu_actions[-1]), len(plan.responses)
    value, old, ref, paid = (torch.randn(size, generator=generator) for _ in range(4))
    score, last = torch.randn(2, count, generator=generator)
    score = torch.where(plan.counted_lengths_N > 0, score, 0.0)
    shaped = compute_advantages(config, 0.1, plan, Scores(score, [], None), old, ref, value, last, paid)
    lengths = [
        int(plan.mask_A[a:b].sum())
        for a, b in zip(plan.cu_actions.tolist(), plan.cu_actions.tolist()[1:], strict=False)
    ]
    adaptive = torch.tensor([max(0.0, 1 - 1 / (config.lam_alpha * x)) if x else 0.0 for x in lengths]).double()
    lam = config.lam if config.lam_policy is None else config.lam_policy
    truths = naive_gae(
        score, value, old, ref, plan.cu_actions,
        kl_coef=0.1,
        gamma=config.gamma,
        lam=adaptive if lam == "adaptive" else lam,
        lam_value=config.lam if config.lam_value is None else config.lam_value,
        unit=config.advantage_unit,
        bootstrap=torch.where(plan.truncated_N, last, 0.0) if config.bootstrap_truncated else None,
        mask=plan.mask_A,
        token_reward=paid,
    )  # fmt: skip
    return shaped, truths, value


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, deadline=None)
@given(masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_advantages_and_returns_are_those_of_the_loop(case, masks):
    plan = masked_plan([len(mask) for mask in masks], masks)
    for backend in BACKENDS:
        with use_backend(shaped_gae=backend):
            shaped, truths, _ = shaped_by(PPOConfig(**CASES[case]), plan)
        for name, truth in zip(("advantage_A", "return_A", "reward_A", "kl_N"), truths, strict=True):
            assert worst(getattr(shaped, name), truth) < 2e-5, (backend, name)


def test_adaptive_lambdas_by_hand():
    lengths = torch.tensor([0, 1, 10, 20, 40, 100, 400])
    assert adaptive_lambda(lengths, 0.05).tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.8, 0.95])


def test_equal_lambdas_by_other_keys_give_the_same_bits():
    plan = masked_plan([9, 4, 7], [[True] * 9, [True, False, True, True], [True] * 7])
    plain, _, _ = shaped_by(PPOConfig(lam=0.9), plan)
    for keys in ({"lam_policy": 0.9, "lam_value": 0.9}, {"lam": 0.9, "lam_policy": 0.9}):
        shaped, _, _ = shaped_by(PPOConfig(**keys), plan)
        assert torch.equal(shaped.advantage_A, plain.advantage_A) and torch.equal(shaped.return_A, plain.return_A)
    assert not PPOConfig(lam_policy=0.9, lam_value=0.9).has_own_returns and PPOConfig(lam_value=0.9).has_own_returns


def test_the_plan_and_the_kernel_agree_on_the_starts_of_turns():
    masks = [[True, True, False, True], [False, True, True], [True], [False, False]]
    plan = masked_plan([4, 3, 1, 2], masks)
    shaped, _, _ = shaped_by(PPOConfig(advantage_unit="turn"), plan)
    assert torch.equal(shaped.value_mask_A, plan.turn_starts_A) and int(plan.turn_starts_A.sum()) == 4


def test_the_critic_learns_at_the_first_token_of_each_turn():
    """Its loss, gradient and count are those of these rows alone."""
    masks = [[True, True, False, True, True], [False, True, True]]
    plan, config = masked_plan([5, 3], masks), PPOConfig(advantage_unit="turn", value_clip=0.0)
    shaped, _, value_A = shaped_by(config, plan)
    moments = shaped.moments
    experience = Experience(plan, None, value_A, value_A, value_A, value_A, shaped, moments, config.has_own_returns)
    head = SimpleNamespace(model=SimpleNamespace(head=lambda hidden: hidden[:, 0]))
    updater = Updater(config, None, head, None, None)
    rows = losses = count = 0
    for work in updater.critic_work(experience, range(len(plan.batches))):
        assert isinstance(work.loss, CriticLoss)
        hidden = torch.randn(work.batch.n_tokens, 1, requires_grad=True)
        out = work.loss(hidden, work.batch)
        out.sum.backward()
        starts = work.batch.value_mask_A
        values = hidden.detach()[work.batch.action_rows_A, 0]
        error = torch.where(starts, values - work.batch.return_A, 0.0)
        assert float(out.sum.detach()) == pytest.approx(float(0.5 * (error**2).sum()), rel=1e-6)
        expected = torch.zeros_like(hidden)
        expected[work.batch.action_rows_A, 0] = error
        torch.testing.assert_close(hidden.grad, expected)
        assert out.count == int(out.stats.count) == int(starts.sum())
        rows, count = rows + work.batch.n_counted_actions, count + out.count
        losses += 1
    assert losses and (rows, count) == (6, 3)


def test_the_explained_variance_is_that_of_the_returns(tmp_path):
    """With lambdas of their own, what the critic lacks of a return is no advantage."""
    kept = []
    watch = SimpleNamespace(on_scores=lambda run, experience: kept.append(experience))
    config = tiny.ppo_config(tmp_path / "run", iterations=1, lam_policy="adaptive", lam_alpha=0.3, lam_value=1.0)
    models = tiny.causal_lm(0), tiny.tokenizer(), tiny.scorer(1), tiny.PROMPTS
    with PPOTrainer(config, *models, callbacks=[watch]) as run:
        step = run.step()
    (experience,) = kept
    returns = experience.shaped.return_A.double()
    errors = returns - experience.value_A.double()
    explained = 1 - float(errors.var(correction=0) / returns.var(correction=0))
    assert step.value_explained_variance == pytest.approx(explained, rel=1e-6)
    # Undiscounted returns at lambda 1 are the rewards that follow.
    for rows in zip(experience.plan.cu_actions.tolist(), experience.plan.cu_actions.tolist()[1:], strict=False):
        reward = experience.shaped.reward_A[slice(*rows)].double()
        torch.testing.assert_close(returns[slice(*rows)], reward.flip(0).cumsum(0).flip(0), rtol=1e-5, atol=1e-5)
    assert math.isfinite(step.value_loss) and step.grad_norm_critic > 0


def test_value_pretraining_keeps_returns_at_lambda_1():
    keys = {"lam_policy": "adaptive", "lam_value": 0.5, "critic": {"pretrain": {"iterations": 1}}}
    config = ValuePretraining(PPOConfig(**keys)).config
    assert config.policy_lambda == config.value_lambda == 1.0 and not config.has_own_returns


def test_keys_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"ppo.lam_policy is 1.5; expected a number from 0 to 1"):
        check_estimator(PPOConfig(lam_policy=1.5))
    with pytest.raises(ConfigError, match=r"ppo.lam_policy=adaptive .* ppo.advantage_unit=turn"):
        check_estimator(PPOConfig(lam_policy="adaptive", advantage_unit="turn"))
    with pytest.raises(ConfigError, match=r"lam_policy: got 'adaptiv' .*adaptive"):
        PPOConfig.load(None, ["ppo.lam_policy=adaptiv"])
    assert PPOConfig.load(None, ["ppo.lam_policy=adaptive"]).policy_lambda == "adaptive"
    assert PPOConfig.load(None, ["ppo.lam_policy=1"]).policy_lambda == 1.0
    assert PPOConfig.load(None, ["ppo.lam_policy=null", "ppo.lam=0.5"]).policy_lambda == 0.5


@pytest.mark.parametrize(
    ("keys", "unread"),
    [
        ({"lam_alpha": 0.1}, "ppo.lam_alpha"),
        ({"lam": 0.9, "lam_policy": 0.8, "lam_value": 1.0}, "ppo.lam"),
        ({"advantage": "reinforce++", "lam_value": 1.0}, "ppo.lam_value"),
        ({"advantage": "reinforce++", "advantage_unit": "turn"}, "ppo.advantage_unit"),
        ({"tis_cap": 3.0, "correction_level": "sequence"}, "ppo.correction_level, ppo.tis_cap"),
        ({"correction": "tis", "tis_cap": 3.0, "dis_low": 0.1, "dis_high": 0.3}, "ppo.dis_low, ppo.dis_high"),
        ({"correction": "dis", "tis_cap": 3.0, "dis_low": 0.1, "correction_level": "sequence"}, "ppo.tis_cap"),
        ({"loss_aggregation": "sequence", "loss_constant": 8}, "ppo.loss_constant"),
        ({"overlong_factor": 0.5}, "ppo.overlong_factor"),
    ],
)
def test_keys_without_effect_are_named(keys, unread, capsys):
    check_estimator(PPOConfig(**keys))
    assert f"does not read {unread}:" in capsys.readouterr().err
    check_estimator(PPOConfig(lam=0.9, lam_policy="adaptive", lam_alpha=0.1))
    check_estimator(PPOConfig(correction="tis", tis_cap=3.0, loss_aggregation="constant", loss_constant=8))
    check_estimator(PPOConfig(correction="dis", dis_high=0.3, overlong_buffer=4, overlong_factor=0.5))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("keys", "needed_by"),
    [
        ({"entropy_coef": 0.1}, "ppo.entropy_coef"),
        ({"positive_nll_coef": 0.1, "kl_in": "loss"}, "ppo.kl_in=loss and ppo.positive_nll_coef"),
    ],
)
def test_rows_that_may_leave_but_cannot_are_a_warning(keys, needed_by, capsys):
    check_estimator(PPOConfig(skip_zero_advantage=True, **keys))
    assert f"ppo.skip_zero_advantage=true has no effect because of {needed_by}:" in capsys.readouterr().err
    check_estimator(PPOConfig(**keys))
    check_estimator(PPOConfig(skip_zero_advantage=True))
    check_estimator(PPOConfig(skip_zero_advantage=True, kl_in="loss", kl_coef=0.0))
    assert capsys.readouterr().err == ""


def test_an_adaptive_lambda_that_is_always_0_is_a_warning(capsys):
    def check(tokens, **keys):
        check_estimator(PPOConfig(lam_policy="adaptive", sampling=SamplingConfig(max_new_tokens=tokens), **keys))
        return capsys.readouterr().err

    assert "ppo.lam_policy=adaptive is 0 for every response: with ppo.lam_alpha=0.05" in check(20)
    assert "up to 20 tokens, and ppo.sampling.max_new_tokens is 20" in check(20).replace("\n", " ")
    assert check(21) == check(20, lam_alpha=0.06) == ""
