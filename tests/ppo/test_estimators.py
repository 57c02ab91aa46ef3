"""Estimators of the advantages against loops in float64, written from their formulas."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.config import CriticConfig, OptimizerConfig, PPOConfig
from icegrt.errors import ConfigError
from icegrt.kernels import available_backends, use_backend, whiten
from icegrt.ppo.advantages import ESTIMATORS
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.estimator_keys import check_estimator
from icegrt.ppo.experience import compute_advantages
from icegrt.ppo.scores import Scores
from icegrt.ppo.trainer import PPOTrainer
from icegrt.rollout.types import Response
from tests.helpers import tiny_models as tiny

# Triton's recursion is tested against the same loop in tests/kernels/triton/test_shaped_gae.py.
BACKENDS = [backend for backend in available_backends("shaped_gae") if backend != "triton"]
WITHOUT_CRITIC = ("rloo", "grpo", "reinforce++")
CASES = {
    "rloo": {"advantage": "rloo"},
    "grpo": {"advantage": "grpo"},
    "grpo by the batch": {"advantage": "grpo", "group_std": "batch"},
    "grpo without std": {"advantage": "grpo", "group_std": "none"},
    "grpo, KL in the loss": {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3"},
    "reinforce++": {"advantage": "reinforce++", "kl_estimator": "k2"},
    "reinforce++, discounted": {"advantage": "reinforce++", "gamma": 0.9, "lam": 0.5},
    "rloo, no KL": {"advantage": "rloo", "kl_coef": 0.0},
}


def estimate(kind, d):
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[kind]


def oracle(config, rows):
    """One list of advantages per row, from loops over rows and tokens. A row that was dropped has zeros."""
    coef = config.kl_coef if config.kl_in == "reward" else 0.0
    rewards = []
    for row in rows:
        tokens = [
            paid - coef * estimate(config.kl_estimator, old - ref)
            for paid, old, ref in zip(row["paid"], row["old"], row["ref"], strict=True)
        ]
        tokens[-1] += row["score"]
        rewards.append(tokens)
    kept = [n for n, row in enumerate(rows) if not row["dropped"]]
    advantages = [[0.0] * len(row["paid"]) for row in rows]
    if config.advantage == "reinforce++":
        for n in kept:
            for t in range(len(rewards[n])):
                advantages[n][t] = sum(config.gamma**k * r for k, r in enumerate(rewards[n][t:]))
        return advantages
    total = {n: sum(rewards[n]) for n in kept}
    groups = defaultdict(list)
    for n in kept:
        groups[rows[n]["prompt"]].append(n)

    def std(numbers):
        mean = sum(numbers) / len(numbers)
        return math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))

    for members in groups.values():
        numbers = [total[n] for n in members]
        if max(numbers) - min(numbers) <= 1e-6 * max(map(abs, numbers)):
            continue
        for n in members:
            if config.advantage == "rloo":
                others = [total[m] for m in members if m != n]
                advantage = total[n] - sum(others) / len(others)
            else:
                divisor = {"group": std(numbers), "batch": std([*total.values()]), "none": 1.0}[config.group_std]
                advantage = (total[n] - sum(numbers) / len(numbers)) / divisor
            advantages[n] = [advantage] * len(rewards[n])
    return advantages


NUMBERS = st.floats(-3, 3, width=32).map(lambda x: round(x, 3))


@st.composite
def draws(draw, most=4):
    """Rows of one to four prompts with one to five responses each, of one to four tokens; some dropped, many tied."""
    rows = []
    for prompt in range(draw(st.integers(1, most))):
        for _ in range(draw(st.integers(1, 5))):
            length = draw(st.integers(1, 4))
            numbers = st.lists(NUMBERS, min_size=length, max_size=length)
            alike = draw(st.booleans())  # log-probs of the reference's: no KL, and ties stay ties
            old = draw(numbers)
            rows.append({
                "prompt": prompt,
                "score": draw(st.one_of(st.sampled_from([0.0, 1.0, 0.1]), NUMBERS)),
                "paid": [0.0] * length if alike else draw(numbers),
                "old": old,
                "ref": old if alike else draw(numbers),
                "dropped": draw(st.integers(0, 5)) == 0,
            })  # fmt: skip
    return rows


def shaped_by_the_engine(config, rows, budget=16):
    """The advantages of the rows, in their order, and what `compute_advantages` returned."""
    samples, responses = defaultdict(int), []
    for n, row in enumerate(rows):
        length, sample = len(row["paid"]), samples[row["prompt"]]
        samples[row["prompt"]] += 1
        # All prompts have the same tokens: a group is what was sampled from one drawn prompt.
        responses.append(Response(row["prompt"], sample, n, [5, 6], [7] * length, [-1.0] * length, "stop"))
    plan = plan_batches(responses, budget, 2)
    (order,) = plan.rank_assignment
    plan = plan.with_masked(torch.tensor([rows[n]["dropped"] for n in order]))
    old, ref, paid = (torch.tensor([x for n in order for x in rows[n][k]]) for k in ("old", "ref", "paid"))
    total = torch.tensor([0.0 if rows[n]["dropped"] else rows[n]["score"] for n in order])
    scores = Scores(total, [], None)
    shaped = compute_advantages(config, config.kl_coef, plan, scores, old, ref, None, None, paid)
    return dict(zip(order, shaped.advantage_A.split([len(rows[n]["paid"]) for n in order]), strict=True)), shaped


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, deadline=None)
@given(rows=draws())
def test_advantages_are_those_of_the_formula(case, rows):
    config = PPOConfig(**({"kl_coef": 0.3} | CASES[case]))
    expected = oracle(config, rows)
    counted = [a for n, row in enumerate(rows) if not row["dropped"] for a in expected[n]]
    for backend in BACKENDS:
        with use_backend(shaped_gae=backend):
            advantages, shaped = shaped_by_the_engine(config, rows)
        for n, row in enumerate(rows):
            assert advantages[n].tolist() == pytest.approx(expected[n], rel=2e-5, abs=2e-5), (backend, row)
        assert int(shaped.moments.count) == len(counted)
        if counted:
            assert float(shaped.moments.mean) == pytest.approx(sum(counted) / len(counted), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("case", [name for name in CASES if "reinforce" not in name])
@given(score=st.floats(-1e4, 1e4, width=32), size=st.integers(2, 9), offset=st.sampled_from([0.0, 1e-7]))
@settings(max_examples=15, deadline=None)
def test_equal_rewards_have_an_advantage_of_exactly_zero(case, score, size, offset):
    # 1e-7 of the score is what fp32 makes of equal texts in two micro-batches.
    config = PPOConfig(**({"kl_coef": 0.3} | CASES[case]))
    row = {"prompt": 0, "paid": [0.0] * 3, "old": [-1.0] * 3, "ref": [-1.0] * 3, "dropped": False}
    group = [row | {"score": score * (1 + offset * (n % 2))} for n in range(size)]
    other = [row | {"prompt": 1, "score": x} for x in (1.0, 2.0)]
    advantages, _ = shaped_by_the_engine(config, [*group, *other])
    assert all(torch.equal(advantages[n], torch.zeros(3)) for n in range(size))
    assert advantages[size][0] < 0 < advantages[size + 1][0]


@pytest.mark.parametrize("case", ["rloo", "grpo", "grpo by the batch", "grpo without std"])
def test_a_response_that_is_left_alone_has_no_advantage_and_shifts_no_other(case):
    config = PPOConfig(**({"kl_coef": 0.0} | CASES[case]))
    row = {"paid": [0.0], "old": [-1.0], "ref": [-1.0]}
    kept = [row | {"prompt": 0, "score": s, "dropped": False} for s in (1.0, 3.0)]
    lonely = [row | {"prompt": 1, "score": s, "dropped": s > 5} for s in (2.0, 9.0, 1e6)]
    advantages, _ = shaped_by_the_engine(config, [*kept, *lonely])
    assert [advantages[n].item() for n in (2, 3, 4)] == [0.0] * 3
    # Half the distance, or all of it: 2 - 1 over 1, or over the std of 1, 3 and 2.
    expected = {"rloo": 2.0, "grpo": 1.0, "grpo by the batch": math.sqrt(1.5), "grpo without std": 1.0}[case]
    assert advantages[1].item() == pytest.approx(expected, rel=1e-6) == -advantages[0].item()


def test_every_estimator_of_the_configuration_exists():
    assert set(ESTIMATORS) == {"gae", *WITHOUT_CRITIC}
    assert [PPOConfig(advantage=name).has_critic for name in ESTIMATORS] == [True, False, False, False]


# -- runs without a critic ---------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path):
    opened = []

    def make(callbacks=(), **config):
        config = tiny.ppo_config(tmp_path / f"run{len(opened)}", **config)
        reward = [tiny.scorer(1), tiny.count_letters]
        opened.append(
            PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks)
        )
        return opened[-1]

    yield make
    for run in opened:
        run.close()


class Experiences:
    """A callback that keeps every experience."""

    def __init__(self):
        self.kept = []

    def on_scores(self, run, experience):
        self.kept.append(experience)


@pytest.mark.parametrize("advantage", WITHOUT_CRITIC)
def test_a_run_without_a_critic_builds_none_and_its_actor_learns(advantage, trainer):
    watch = Experiences()
    run = trainer([watch], advantage=advantage, samples_per_prompt=3)
    assert set(run.components.roles) == {"actor", "reference", "reward"} and run.critic is None
    before = tiny.parameters(run.actor)
    steps = list(run)
    assert not tiny.same(tiny.parameters(run.actor), before)
    for step in steps:
        critic = (step.value_loss, step.value_explained_variance, step.grad_norm_critic, step.lr_critic)
        assert critic == (None,) * 4 and step.grad_norm_actor > 0 and step.skipped_steps == 0
    assert all(e.value_A is None for e in watch.kept)
    assert set(run.state()["skipped_in_a_row"]) == {"actor"}
    run.write_report()
    page = (run.dir / "report.html").read_text()
    assert "Value explained variance" not in page and "Clip fraction" in page  # titles of charts


@pytest.mark.parametrize("advantage", WITHOUT_CRITIC)
def test_learning_rate_0_keeps_ratio_1_without_a_critic(advantage, trainer):
    run = trainer(advantage=advantage, optimizer=OptimizerConfig(lr=0.0))
    for _ in range(2):
        step = run.step()
        assert (step.ratio_min, step.ratio_max) == (1.0, 1.0) and step.kl_nats_per_response == 0.0
        assert step.grad_norm_actor > 0


def test_rloo_is_not_whitened_unless_asked(trainer):
    assert PPOConfig(advantage="rloo").whitening == PPOConfig(advantage="grpo").whitening == "none"
    assert PPOConfig(advantage="reinforce++").whitening == PPOConfig().whitening == "global"
    assert PPOConfig(advantage="grpo", whiten_advantages=True).whitening == "global"
    assert (
        PPOConfig(whiten_advantages=False).whitening == "none"
        and PPOConfig(whiten_advantages="rank").whitening == "rank"
    )


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_one_sample_per_prompt_is_refused_where_responses_are_compared(advantage):
    with pytest.raises(ConfigError, match=rf"ppo.advantage={advantage} compares .* ppo.samples_per_prompt is 1"):
        check_estimator(PPOConfig(advantage=advantage, samples_per_prompt=1))
    check_estimator(PPOConfig(advantage="reinforce++", samples_per_prompt=1))


def test_bootstrapping_without_a_critic_is_refused():
    with pytest.raises(ConfigError, match=r"ppo.bootstrap_truncated needs the value of a critic"):
        check_estimator(PPOConfig(advantage="reinforce++", bootstrap_truncated=True))


def test_a_critic_is_refused_where_there_is_none(tmp_path):
    config = tiny.ppo_config(tmp_path / "run", advantage="rloo")
    with pytest.raises(ConfigError, match=r"a critic is given, but ppo.advantage is rloo"):
        PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), tiny.count_letters, tiny.PROMPTS, critic=tiny.scorer(1))
    assert not (tmp_path / "run").exists()


def test_keys_that_nothing_reads_are_named(capsys):
    critic = CriticConfig(warmup_iterations=2, optimizer=OptimizerConfig(lr=1e-3))
    keys = {"lam": 0.9, "gamma": 0.99, "group_std": "none", "reuse_update_values": True, "minibatches": 1}
    check_estimator(PPOConfig(advantage="rloo", critic=critic, **keys))
    message = capsys.readouterr().err
    for key in ("critic.warmup_iterations", "critic.optimizer.lr", "lam", "gamma", "group_std", "reuse_update_values"):
        assert f"ppo.{key}" in message
    assert "ppo.advantage=rloo does not read" in message and "value_clip" not in message
    check_estimator(PPOConfig(critic=critic, lam=0.9, gamma=0.99))
    check_estimator(PPOConfig(advantage="grpo", group_std="none"))
    assert capsys.readouterr().err == ""


# -- whitening by rank -------------------------------------------------------------------------------------------------


def test_one_rank_whitens_by_its_own_moments_as_by_those_of_all(trainer):
    watch = Experiences()
    figures = []
    for whitening in (True, "rank"):
        run = trainer([watch], whiten_advantages=whitening)
        figures.append([(s.policy_loss, s.grad_norm_actor, s.ratio_max) for s in run])
        run.close()
    assert figures[0] == figures[1]
    experience, config = watch.kept[0], PPOConfig(whiten_advantages="rank")
    assert experience.whitening_moments(config) is experience.shaped.moments
    white = whiten(experience.shaped.advantage_A, experience.shaped.moments)
    assert float(white.mean()) == pytest.approx(0.0, abs=1e-6)
