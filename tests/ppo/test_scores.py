"""What a response is worth before PPO sees it, the advantages' scale, and the controller of the KL coefficient."""

import pytest
import torch

from icegrt.kernels import masked_moments, whiten
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.experience import compute_advantages
from icegrt.ppo.kl_controller import kl_controller
from icegrt.ppo.scores import RunningScoreNormalizer, total_scores
from tests.helpers import tiny_models as tiny


def test_the_penalty_follows_the_finish_reason_and_not_the_length():
    answers = tiny.responses(9)
    config = tiny.ppo_config("unused", missing_eos_penalty=2.0, bootstrap_truncated=True, kl_coef=0.0)
    longest = max(len(r.tokens) for r in answers if not r.truncated)
    assert longest >= max(len(r.tokens) for r in answers if r.truncated)  # the longest answer ends with EOS
    plan = plan_batches(answers, 4096, 1)
    truncated_N = plan.truncated_N
    scores = total_scores(config, {}, [], torch.ones(9), truncated_N)
    assert torch.equal(scores.total_N, 1.0 - 2.0 * truncated_N)
    actions = sum(len(r.tokens) for r in answers)
    zero = torch.zeros(actions)
    shaped = compute_advantages(config, 0.0, plan, scores, zero, zero, zero, torch.full((9,), 10.0))
    last = shaped.return_A[plan.cu_actions[1:].long() - 1]
    assert torch.equal(last, scores.total_N + 10.0 * truncated_N)


def test_scores_are_taken_as_they_are_until_there_are_statistics():
    scaling = RunningScoreNormalizer(tiny.ppo_config("unused", score_clip=0.0))
    score_N = torch.tensor([0.5, -2.0])
    assert torch.equal(scaling.apply(score_N), score_N)
    scaling.update(torch.tensor([4.0, -4.0]), None)
    assert torch.allclose(scaling.apply(score_N), score_N / 4.0)


@pytest.mark.parametrize("scores", [[3.0], [0.1] * 7, [1e6] * 5, [1e6, 1e6 + 0.0625], [0.0, 0.0]])
def test_scores_without_a_spread_are_not_divided(scores):
    scaling = RunningScoreNormalizer(tiny.ppo_config("unused", score_clip=0.0))
    scaling.update(torch.tensor(scores), None)
    assert scaling.factor == 1.0 and torch.equal(scaling.apply(torch.tensor(scores)), torch.tensor(scores))


def test_a_small_spread_beside_a_small_mean_is_divided_by():
    scaling = RunningScoreNormalizer(tiny.ppo_config("unused", score_clip=0.0))
    scaling.update(torch.tensor([1e-9, 3e-9]), None)
    assert torch.allclose(scaling.apply(torch.tensor([1e-9, 3e-9])), torch.tensor([1.0, 3.0]))


def test_the_adaptive_controller_follows_ziegler():
    config = tiny.ppo_config(
        "unused", kl_control="adaptive", kl_coef=0.2, kl_target_nats_per_response=6.0, kl_horizon_responses=1000
    )
    controller = kl_controller(config)
    expected = 0.2
    for kl, error in ((6.6, 0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2), (5.4, -0.1)):
        controller.update(kl, 64)
        expected *= 1 + error * 64 / 1000
        assert controller.coef == pytest.approx(expected, rel=1e-12)
    restored = kl_controller(config)
    restored.load_state(controller.state())
    assert restored.coef == controller.coef


def test_whitening_divides_by_the_population_variance():
    x = torch.tensor([1.0, 2.0, 6.0])
    white = whiten(x, masked_moments(x))
    assert torch.allclose(white, (x - 3.0) / (14.0 / 3.0) ** 0.5, atol=1e-6)
    single = torch.tensor([4.0])
    assert torch.equal(whiten(single, masked_moments(single)), torch.zeros(1))
