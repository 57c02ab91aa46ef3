"""Sources of reward inside PPO: their weighted sum, rewards per token, dropped responses, what is logged of each."""

import dataclasses
import json
import math

import pytest
import torch

import icegrt
from icegrt.errors import RewardError
from icegrt.metrics import read_metrics
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.experience import Experience, compute_advantages
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.scores import total_scores
from icegrt.ppo.scoring import LogprobScorer, score_values
from icegrt.ppo.update import Updater
from icegrt.rewards.sample import RewardResult
from icegrt.rewards.sources import SourceScores
from icegrt.rollout.samples import sample_of
from tests.helpers import reward_cases
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny
from tests.helpers.encoding import encode_prompts, read_rows

SCORER = LogprobScorer(1.0, 16)


def trained(home, folder, *keys, reward=None):
    config = icegrt.PPOConfig.load(None, cases.ppo_keys(home, folder, *keys))
    with icegrt.PPOTrainer(config, reward=reward) as trainer:
        steps = list(trainer)
    return steps, cases.read_jsonl(folder / "rollouts" / "iteration_00001.jsonl")


def test_model_functions_and_scorer_are_one_weighted_sum_and_logged_one_by_one(home, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "more.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': 0.5, 'letters': len(solution_str)}\n"
    )
    with reward_cases.http_scorer() as endpoint:
        sources = [
            {"function": f"{tmp_path}/more.py:compute_score", "weight": 2.0, "label_key": "topic"},
            {"url": endpoint.url, "name": "judge", "weight": -0.25},
        ]
        steps, rows = trained(
            home, tmp_path / "run", f"ppo.reward.sources={json.dumps(sources)}", "ppo.reward_function_weight=3",
            "ppo.score_scale=false", "ppo.score_clip=0", "ppo.reward.workers=2",
        )  # fmt: skip
    for row in rows:
        by_source = row["sources"]
        assert list(by_source) == ["share_of_a", "compute_score", "judge"] and not row["dropped"]
        assert by_source["share_of_a"]["score"] == row["function_score"]
        assert by_source["judge"]["score"] == len(row["text"])
        assert by_source["compute_score"]["metrics"] == {"letters": len(row["text"])}
        parts = [part["weight"] * part["score"] for part in by_source.values()]
        assert row["score"] == pytest.approx(row["reward_model_score"] + sum(parts), abs=1e-5)
    figures = steps[0].sources
    assert list(figures) == ["reward_model", "share_of_a", "compute_score", "judge"]
    lengths = torch.tensor([float(len(row["text"])) for row in rows])
    assert figures["judge"]["score_mean"] == pytest.approx(lengths.mean().item())
    assert figures["judge"]["score_std"] == pytest.approx(lengths.std(correction=0).item())
    assert figures["compute_score"]["metrics/letters_mean"] == pytest.approx(lengths.mean().item())
    assert figures["judge"]["errors"] == 0 and steps[0].reward_errors == 0
    assert figures["reward_model"]["score_mean"] == pytest.approx(steps[0].reward_model_score_mean)
    logged = next(row for row in read_metrics(tmp_path / "run") if row["kind"] == "ppo")["sources"]
    assert logged == json.loads(json.dumps(figures))


def test_sources_from_python_with_weights(home, tmp_path):
    def one(samples):
        return [1.0] * len(samples)

    def two(samples):
        assert all(s.prompt.endswith("<assistant>") and s.messages[-1]["content"] == s.text for s in samples)
        assert {s.index for s in samples} <= {0, 1}
        return [2.0] * len(samples)

    keys = ["ppo.critic.init=actor", "ppo.iterations=1", "ppo.reward_function_weight=5"]
    (step,), rows = trained(home, tmp_path / "run", *keys, reward=[one, (two, 0.5)])
    assert step.score_mean == pytest.approx(5 * 1.0 + 0.5 * 2.0)
    assert list(rows[0]["sources"]) == ["one", "two"]


def test_token_rewards_go_through_gae(home, tmp_path):
    def first_token(samples):
        return [RewardResult(0.0, {}, [1.0] + [0.0] * (len(s.tokens) - 1)) for s in samples]

    experiences = []

    class Watch(icegrt.Callback):
        def on_scores(self, trainer, experience):
            experiences.append(experience)

    keys = ["ppo.critic.init=actor", "ppo.iterations=1", "ppo.kl_coef=0", "ppo.reward_function_weight=2"]
    config = icegrt.PPOConfig.load(None, cases.ppo_keys(home, tmp_path / "run", *keys))
    with icegrt.PPOTrainer(config, reward=first_token, callbacks=[Watch()]) as trainer:
        (step,) = list(trainer)
    (experience,) = experiences
    starts = experience.plan.cu_actions[:-1].long()
    expected = torch.zeros_like(experience.shaped.reward_A).index_fill(0, starts, 2.0)
    assert torch.equal(experience.shaped.reward_A, expected)
    assert step.score_mean == 0.0 and step.reward_mean == pytest.approx(2.0)


# -- dropping -------------------------------------------------------------------------------------------------------


def verdict_on(plan, dropped):
    """Scores by sequence id; the responses of `dropped` failed."""
    tokenizer = tiny.tokenizer()
    prompts = encode_prompts(tokenizer, read_rows(tiny.PROMPTS), 64)
    samples = [sample_of(tokenizer, r, prompts[r.prompt_index % len(prompts)]) for r in plan.local_responses]
    failed = [r.sequence_id in dropped for r in plan.local_responses]
    results = [
        RewardResult(None if f else float(r.sequence_id)) for f, r in zip(failed, plan.local_responses, strict=True)
    ]
    return RewardOutputs(samples, [], [SourceScores("f", 1.0, results, ["no" if f else None for f in failed])])


def learners(config):
    """An actor and a critic."""
    critic = tiny.role(tiny.scorer(), "scalar", learns=config.optimizer)
    return tiny.role(tiny.causal_lm(), learns=config.optimizer), critic


def experience_with(config, actor, critic, responses, dropped):
    """What actor and critic make of responses of which some are dropped."""
    plan = plan_batches(responses, config.token_budget, config.minibatches)
    rewards = verdict_on(plan, dropped)
    plan = plan.with_masked(rewards.dropped_N)
    old_A, entropy_A = SCORER(actor, plan.batches, entropy=True)
    value_A, last_N = score_values(critic, plan.batches)
    scores = total_scores(config, {}, [], rewards.source_total_N, plan.truncated_N, rewards.dropped_N)
    shaped = compute_advantages(config, 0.1, plan, scores, old_A, old_A - 0.1, value_A, last_N)
    return Experience(plan, scores, old_A, entropy_A, old_A - 0.1, value_A, shaped, shaped.moments)


def gradients(responses, dropped, budget):
    """Of actor and critic, as by name, with some responses dropped, under a token budget."""
    config = tiny.ppo_config("unused", token_budget=budget, kl_coef=0.1, minibatches=1)
    actor, critic = learners(config)
    experience = experience_with(config, actor, critic, responses, dropped)
    plan, updater = experience.plan, Updater(config, actor, critic, SCORER, tiny.current_cluster())
    members = list(range(len(plan.batches)))
    policy, value = updater.policy_work(experience, members, 0.1), updater.critic_work(experience, members)
    counted = sum(b.n_counted_actions for b in plan.batches)
    role_gradients = tiny.gradients(actor, policy), tiny.gradients(critic, value)
    return role_gradients, counted, experience.moments, len(plan.batches)


@pytest.mark.parametrize("budget", [4096, 40])
def test_a_dropped_response_is_trained_on_nowhere(cluster, budget):
    responses = tiny.responses(9)
    dropped = {1, 4, 5}
    actual, counted, moments, batches = gradients(responses, dropped, budget)
    responses_left = [r for r in responses if r.sequence_id not in dropped]
    expected_gradients, expected, expected_moments, _ = gradients(responses_left, set(), 4096)
    assert counted == expected == sum(len(r.tokens) for r in responses_left) and (batches > 1) == (budget < 4096)
    assert float(moments.count) == counted
    assert float(moments.mean) == pytest.approx(float(expected_moments.mean), abs=1e-6)
    for role_gradients, expected_of_role in zip(actual, expected_gradients, strict=True):
        assert tiny.gap(role_gradients, expected_of_role)[0] <= 1e-5


@pytest.mark.parametrize(("dropped", "empty"), [(set(), 0), ({1}, 2), ({0, 1}, 4)])
def test_a_minibatch_of_dropped_responses_is_no_step(cluster, dropped, empty):
    config = tiny.ppo_config("unused", token_budget=64, kl_coef=0.1, minibatches=2, ppo_epochs=1)
    actor, critic = learners(config)
    updater, responses = Updater(config, actor, critic, SCORER, tiny.current_cluster()), tiny.responses(2)
    updater.run(experience_with(config, actor, critic, responses, set()), 0.1, 1)  # gives Adam its momentum
    before = tiny.parameters(actor), tiny.parameters(critic)
    outcome = updater.run(experience_with(config, actor, critic, responses, dropped), 0.1, 2)
    assert outcome.empty == empty and len(outcome.actor) == len(outcome.critic) == 2 - empty // 2
    still = tiny.same(tiny.parameters(actor), before[0]), tiny.same(tiny.parameters(critic), before[1])
    assert still == ((empty == 4),) * 2


def failing(samples):
    return [math.nan if s.index == 0 and "cat" in s.prompt else 1.0 for s in samples]


@pytest.mark.parametrize("on_error", ["score", "drop"])
def test_failures_are_counted_and_kept_out_of_the_means(home, tmp_path, on_error):
    keys = [
        "ppo.critic.init=actor",
        "ppo.prompts_per_iteration=8",
        "ppo.iterations=1",
        f"ppo.reward.on_error={on_error}",
    ]
    keys += ["ppo.reward.error_score=-3", "ppo.eval_every=0", f"ppo.eval_prompts={home.prompts}"]
    (step,), rows = trained(home, tmp_path / "run", *keys, reward=failing)
    failed_rows = [row for row in rows if row["sources"]["failing"]["error"]]
    assert [row["sample"] for row in failed_rows] == [0]
    assert "returned nan for" in failed_rows[0]["sources"]["failing"]["error"]
    assert step.reward_errors == 1 == step.sources["failing"]["errors"]
    if on_error == "drop":
        assert step.dropped_responses == 1 and failed_rows[0]["dropped"] and failed_rows[0]["function_score"] is None
        assert step.score_mean == 1.0 and step.score_std == 0.0 and step.function_score_mean == 1.0
        assert set(failed_rows[0]["advantages"]) == {0.0}
        assert step.evaluation.score_mean == 1.0
    else:
        assert step.dropped_responses == 0 and failed_rows[0]["score"] == -3.0
        assert step.score_mean == pytest.approx((15 * 1.0 - 3.0) / 16)
    assert step.rollout_logprob_gap_max < 1e-4


def test_the_first_minibatch_has_ratio_1_with_responses_dropped(home, tmp_path):
    keys = ["ppo.critic.init=actor", "ppo.prompts_per_iteration=8", "ppo.iterations=1", "ppo.reward.on_error=drop"]
    keys += ["ppo.ppo_epochs=1", "ppo.minibatches=1", "ppo.token_budget=64"]
    (step,), _ = trained(home, tmp_path / "run", *keys, reward=failing)
    assert step.dropped_responses == 1 and (step.ratio_min, step.ratio_max) == (1.0, 1.0)


def test_an_iteration_without_any_response_left_ends_the_run(home, tmp_path):
    calls = []

    def later(samples):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("the service is down")
        return [1.0] * len(samples)

    keys = ["ppo.critic.init=actor", "ppo.reward.on_error=drop"]
    with pytest.raises(RewardError, match=r"every response of an iteration was dropped.*the service is down"):
        trained(home, tmp_path / "run", *keys, reward=later)


def test_a_source_that_has_nothing_to_say_is_left_out_of_its_own_mean(home, tmp_path):
    def of_one_task(prompts, completions, topic, **columns):
        return [4.0 if t == 0 else None for t in topic]

    keys = ["ppo.critic.init=actor", "ppo.prompts_per_iteration=8", "ppo.iterations=1"]
    (step,), rows = trained(home, tmp_path / "run", *keys, reward=of_one_task)
    assert step.function_score_mean == 4.0 and step.score_mean == pytest.approx(4.0 * 2 / 16)
    assert step.reward_errors == 0 == step.dropped_responses
    assert sorted({str(row["function_score"]) for row in rows}) == ["4.0", "None"]


def test_samples_are_frozen_and_public():
    frozen = reward_cases.sample("x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.text = "y"
    assert icegrt.Sample is type(frozen) and icegrt.RewardResult is RewardResult
