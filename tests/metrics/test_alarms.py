"""Alarms: each one is raised when it should, names figure, threshold and key, and is silent on a healthy run."""

import dataclasses
import json
import math

import numpy as np
import pytest

from icegrt.config import CriticConfig, OptimizerConfig, PPOConfig, RunConfig
from icegrt.metrics.alarms import REPEAT_ITERATIONS, Alarms, trend
from tests.helpers.step_records import evaluation, step


def messages(steps, config=None):
    alarms = Alarms(config or PPOConfig())
    return [message for s in steps for message in alarms.check(s)]


def test_a_healthy_run_raises_nothing():
    noise = np.random.default_rng(0)
    steps = [
        step(
            i,
            reward_model_score_mean=0.05 * i + 0.02 * noise.normal(),
            function_score_mean=0.7 + 0.002 * i + 0.01 * noise.normal(),
            kl_nats_per_response=0.3 * (i - 1),
            evaluation=evaluation(i, reward_model_score_mean=0.05 * i, function_score_mean=0.7) if i % 5 == 0 else None,
        )
        for i in range(1, 25)
    ]
    assert messages(steps) == []


def scores(slope_model, slope_true, sigma=0.01):
    noise = np.random.default_rng(1)
    for i in range(1, 13):
        model = slope_model * i + sigma * noise.normal()
        yield step(i, reward_model_score_mean=model, function_score_mean=0.7 + slope_true * i + sigma * noise.normal())


def test_gaming_the_reward_model():
    alarm_messages = messages(scores(0.05, -0.02))
    assert len(alarm_messages) == 1
    assert (
        "gamed" in alarm_messages[0]
        and "task score" in alarm_messages[0]
        and "ppo.reward_model_weight" in alarm_messages[0]
    )


def test_the_reward_model_disagreeing():
    assert ["disagrees" in m for m in messages(scores(-0.05, 0.02))] == [True]


def test_noise_alone_is_rarely_called_gaming():
    noise = np.random.default_rng(2)
    runs = 100
    alarm_count = sum(
        bool(
            messages(
                step(i, reward_model_score_mean=0.1 * i, function_score_mean=0.7 + 0.03 * noise.normal())
                for i in range(1, 25)
            )
        )
        for _ in range(runs)
    )
    assert alarm_count <= 4


@pytest.mark.parametrize("slopes", [(0.05, 0.02), (0.05, 0.0), (0.0, -0.02), (-0.05, -0.02)])
def test_no_parting_without_two_opposite_trends(slopes):
    assert messages(scores(*slopes)) == []


def test_gaming_on_held_out_prompts():
    steps = [
        step(
            i,
            evaluation=evaluation(
                i, reward_model_score_mean=0.2 * i + 0.01 * (i % 2), function_score_mean=0.7 - 0.03 * i
            ),
        )
        for i in range(1, 6)
    ]
    alarm_messages = messages(steps)
    assert len(alarm_messages) == 1 and "held-out" in alarm_messages[0] and "5 evaluations" in alarm_messages[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kl_nats_per_response": 12.5}, ("12.5 nats", "12 nats", "ppo.kl_coef")),
        ({"truncated_fraction": 0.25}, ("25%", "20%", "ppo.sampling.max_new_tokens")),
        ({"clip_fraction": 0.5}, ("50%", "40%", "ppo.optimizer.lr")),
        ({"rollout_logprob_gap_max": 0.02}, ("0.02", "0.01", "ppo.run.dtype")),
        ({"rollout_logprob_gap_mean": 0.004}, ("0.004 nats per token", "0.001", "ppo.run.dtype")),
        ({"rollout_logprob_gap_mean": None, "rollout_logprob_gap_max": 0.02}, ("up to 0.02", "ppo.run.dtype")),
        ({"correction_fraction": 0.3}, ("30%", "20%", "ppo.tis_cap")),
        ({"skipped_steps": 2}, ("2 optimizer steps", "allowed: 0", "ppo.optimizer.lr")),
        ({"value_loss": math.nan}, ("value_loss", "ppo.optimizer.lr")),
    ],
)
def test_one_figure_out_of_bounds(changes, words):
    alarm_messages = messages([step(2, **changes)])
    assert len(alarm_messages) == 1
    assert all(word in alarm_messages[0] for word in words)


def test_what_dis_replaces_is_not_watched_and_what_it_masks_is():
    """Its ratio is to the rollout's probability, and without inference there is no gap."""
    config = PPOConfig(correction="dis", kl_logprobs="rollout", optimizer=OptimizerConfig(lr=0.0))
    no_gap = {"rollout_logprob_gap_mean": None, "rollout_logprob_gap_max": None}
    quiet = step(1, ratio_max=1.001, clip_fraction=0.5, kl_nats_per_response=0.02, **no_gap)
    assert messages([quiet], config) == []
    (message,) = messages([step(1, correction_fraction=0.5)], config)
    assert "ppo.dis_low and ppo.dis_high (now 0.2 and 0.2)" in message


def test_bf16_may_differ_more_between_rollout_and_scoring():
    config = PPOConfig(run=RunConfig(dtype="bf16"))
    assert messages([step(2, rollout_logprob_gap_mean=0.05, rollout_logprob_gap_max=0.7)], config) == []
    assert "bf16" in messages([step(2, rollout_logprob_gap_mean=0.2)], config)[0]
    assert "bf16" in messages([step(2, rollout_logprob_gap_max=3.0)], config)[0]


def test_entropy_collapse_is_measured_against_the_first_iterations():
    alarm_messages = messages([step(i, entropy_nats_per_token=e) for i, e in enumerate((1.0, 1.2, 0.8, 0.31, 0.29), 1)])
    assert (
        len(alarm_messages) == 1
        and "0.29 nats" in alarm_messages[0]
        and "30%" in alarm_messages[0]
        and "ppo.entropy_coef" in alarm_messages[0]
    )


def test_ratio_must_be_one_when_the_actor_stands_still():
    still = PPOConfig(optimizer=OptimizerConfig(lr=0.0))
    assert messages([step(1, ratio_min=1.0, ratio_max=1.0)], still) == []
    assert "tolerance 1e-06" in messages([step(1, ratio_min=1.0, ratio_max=1.001)], still)[0]
    warmup = PPOConfig(critic=CriticConfig(warmup_iterations=2))
    assert len(messages([step(i) for i in (1, 2, 3)], warmup)) == 1
    assert len(messages([step(5)], PPOConfig(ppo_epochs=1, minibatches=1))) == 1


def test_first_iteration_starts_at_the_reference():
    assert "first iteration" in messages([step(1, kl_nats_per_response=-0.5)])[0]
    assert messages([step(1, kl_nats_per_response=0.5)], PPOConfig(actor="a", reference="b")) == []


def test_critic_negative_for_long():
    assert messages([step(i, value_explained_variance=-0.1) for i in range(1, 8)]) == []
    alarm_messages = messages([step(i, value_explained_variance=-0.1) for i in range(1, 10)])
    assert len(alarm_messages) == 1 and "ppo.critic.warmup_iterations" in alarm_messages[0]


def test_answers_becoming_alike():
    steps = [step(i, evaluation=evaluation(i, distinct_fraction=d)) for i, d in ((1, 0.9), (2, 0.5), (3, 0.2))]
    alarm_messages = messages(steps)
    assert len(alarm_messages) == 1 and "20%" in alarm_messages[0] and "90%" in alarm_messages[0]


def test_a_lasting_alarm_is_repeated_now_and_then():
    alarm_messages = messages([step(i, truncated_fraction=0.5) for i in range(1, 2 * REPEAT_ITERATIONS + 2)])
    assert len(alarm_messages) == 3


def test_resumed_alarms_are_those_of_an_uninterrupted_run():
    steps = [
        dataclasses.replace(
            s, entropy_nats_per_token=1 / s.iteration, truncated_fraction=0.3, value_explained_variance=-1
        )
        for s in scores(0.05, -0.02)
    ]
    uninterrupted = Alarms(PPOConfig())
    expected = [uninterrupted.check(s) for s in steps]
    for position in (0, 3, 7, 11):
        first, second = Alarms(PPOConfig()), Alarms(PPOConfig())
        first_alarms = [first.check(s) for s in steps[:position]]
        second.load_state(json.loads(json.dumps(first.state())))
        assert first_alarms + [second.check(s) for s in steps[position:]] == expected
        assert second.state() == uninterrupted.state()


def test_trend():
    assert trend([1.0, 2.0]) == 0.0 and trend([3.0] * 5) == 0.0
    assert trend([1.0, 2.0, 3.0]) == math.inf and trend([3.0, 2.0, 1.0]) == -math.inf
    assert trend([1.0, 2.1, 2.9, 4.0]) == pytest.approx(0.98 / 0.0018**0.5)
