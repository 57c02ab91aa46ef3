"""Responses without advantage leave the actor's pass; loss, gradients and steps stay those of the pass with all."""

import pytest
import torch

from icegrt.config import OptimizerConfig
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.experience import Experience, compute_advantages
from icegrt.ppo.loss_weights import loss_weights
from icegrt.ppo.metrics import correction_metrics
from icegrt.ppo.policy_rows import policy_rows, rows_can_leave
from icegrt.ppo.scores import Scores
from icegrt.ppo.scoring import LogprobScorer
from icegrt.ppo.update import UpdateOutcome, Updater
from icegrt.rollout.types import Response
from tests.helpers import tiny_models as tiny
from tests.helpers.tied_scores import tied_config, tied_trainer

pytestmark = pytest.mark.usefixtures("cluster")
UNCLIPPED = OptimizerConfig(lr=1e-2, clip_grad=0.0)
SCORER = LogprobScorer(1.0, 16)


@pytest.fixture(scope="module")
def actor(cluster):
    return tiny.role(tiny.causal_lm(0), learns=UNCLIPPED)


def experience_of(config, actor, cluster, dropped=()):
    """Twelve responses to four prompts, of which the first and the third have equal scores; ratios differ from 1."""
    drawn = tiny.responses(12, seed=8)
    answers = [
        Response(n // 3, n % 3, n, drawn[n // 3].prompt, r.tokens, r.logprobs, r.finish_reason)
        for n, r in enumerate(drawn)
    ]
    plan = plan_batches(answers, config.token_budget, config.minibatches, minibatch_by=config.minibatch_by)
    ids = [r.sequence_id for r in plan.local_responses]
    plan = plan.with_masked(torch.tensor([n in dropped for n in ids]))
    old, entropy = SCORER(actor, plan.batches, entropy=True)
    old = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    by_id = [1.0, 1.0, 1.0, 0.0, 1.5, 2.0, 0.5, 0.5, 0.5, 3.0, 0.0, 0.0]
    scores = Scores(torch.tensor([0.0 if n in dropped else by_id[n] for n in ids]), [], None)
    shaped = compute_advantages(config, config.kl_coef, plan, scores, old, old, None, None)
    rollout = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
    weights = loss_weights(config, plan, old, rollout, None, cluster)
    return Experience(plan, scores, old, entropy, old, None, shaped, shaped.moments, rollout, weights)


def totals(work):
    return sum(item.batch.n_tokens for item in work)


WIDE = {"dis_low": 0.5, "dis_high": 1.0}
LOSSES = [
    {},
    {"loss_aggregation": "sequence"},
    {"loss_aggregation": "constant"},
    {"correction": "tis"},
    {"correction": "tis", "correction_level": "sequence", "loss_aggregation": "sequence"},
    {"correction": "dis", **WIDE},
    {"correction": "dis", "loss_aggregation": "sequence", **WIDE},
    {"correction": "dis", "correction_level": "sequence", "loss_aggregation": "constant", **WIDE},
]


@pytest.mark.parametrize("dropped", [(), (0, 4)], ids=["all kept", "two dropped"])
@pytest.mark.parametrize("minibatch_by", ["response", "prompt"])
@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: " ".join(map(str, settings.values())) or "defaults")
def test_loss_and_gradients_are_those_of_all_rows_with_fewer_tokens(
    settings, minibatch_by, dropped, actor, cluster, tmp_path
):
    config = tied_config(tmp_path, minibatch_by=minibatch_by, token_budget=40, **settings)
    experience = experience_of(config, actor, cluster, dropped)
    updater = Updater(config, actor, None, SCORER, cluster)
    rows = policy_rows(config, experience, 0.0, cluster)
    assert rows.left_responses == 6 + (4 in dropped)
    for minibatch in range(config.minibatches):
        full, less = experience.plan.minibatches[minibatch], rows.experience.plan.minibatches[minibatch]
        all_work = updater.policy_work(experience, full, 0.0)
        work = updater.policy_work(rows.experience, less, 0.0, left_actions=rows.left_actions)
        assert totals(work) < totals(all_work)
        gradients = tiny.gradients(actor, work)
        loss = sum(float(x) for x in actor.accumulate(work)[1])
        expected = tiny.gradients(actor, all_work)
        stats, losses = actor.accumulate(all_work)
        counts = [sum(float(s.count) for s in part) for part in (stats, actor.accumulate(work)[0])]
        assert counts[0] == counts[1] > 0
        assert loss / counts[1] == pytest.approx(sum(float(x) for x in losses) / counts[0], abs=1e-6)
        assert tiny.gap(gradients, expected)[0] <= 1e-6


@pytest.mark.parametrize("settings", LOSSES[4:6], ids=["tis", "dis"])
def test_weights_and_rollout_log_probs_stay_with_their_response(settings, actor, cluster, tmp_path):
    config = tied_config(tmp_path, token_budget=40, **settings)
    experience = experience_of(config, actor, cluster, (4,))
    rows = policy_rows(config, experience, 0.0, cluster).experience
    starts, streams = experience.plan.cu_actions.tolist(), [experience.rollout_logprob_A, experience.weights.weight_A]
    numbers = {r.sequence_id: n for n, r in enumerate(experience.plan.local_responses)}
    order = [numbers[r.sequence_id] for r in rows.plan.local_responses]
    assert order != list(range(len(order)))
    for all_A, own_A in zip(streams, [rows.rollout_logprob_A, rows.weights.weight_A], strict=True):
        assert (all_A is None) == (own_A is None)
        if all_A is not None:
            assert torch.equal(own_A, torch.cat([all_A[starts[n] : starts[n + 1]] for n in order]))


def test_the_mean_counts_what_left(actor, cluster, tmp_path):
    # Without the responses that left in the count, the gradient would be that of a smaller batch.
    config = tied_config(tmp_path, minibatches=1)
    experience = experience_of(config, actor, cluster)
    updater = Updater(config, actor, None, SCORER, cluster)
    rows = policy_rows(config, experience, 0.0, cluster)
    members = rows.experience.plan.minibatches[0]
    uncounted = tiny.gradients(actor, updater.policy_work(rows.experience, members, 0.0))
    expected = tiny.gradients(actor, updater.policy_work(experience, experience.plan.minibatches[0], 0.0))
    assert tiny.gap(uncounted, expected)[0] > 0.1


def test_statistics_of_dis_are_over_the_tokens_that_the_pass_read(actor, cluster, tmp_path):
    config = tied_config(tmp_path, minibatches=1, correction="dis")
    experience = experience_of(config, actor, cluster)
    rows = policy_rows(config, experience, 0.0, cluster)
    members = rows.experience.plan.minibatches[0]
    work = Updater(config, actor, None, SCORER, cluster).policy_work(
        rows.experience, members, 0.0, left_actions=rows.left_actions
    )
    outcome = UpdateOutcome()
    outcome.add(actor.accumulate(work)[0])
    logprob, _ = SCORER(actor, rows.experience.plan.batches)
    ratio = (logprob - rows.experience.rollout_logprob_A).exp()
    masked = ((ratio < 1 - config.dis_low) | (ratio > 1 + config.dis_high)).float()
    assert rows.left_responses > 0 and 0 < masked.mean() < 1
    figures = {name: float(x) for name, x in correction_metrics(experience, outcome, cluster).items()}
    assert figures == {
        "correction_ratio_mean": pytest.approx(float(ratio.mean()), rel=1e-5),
        "correction_ratio_max": pytest.approx(float(ratio.max()), rel=1e-5),
        "correction_fraction": pytest.approx(float(masked.mean())),
    }


def test_who_may_leave(tmp_path):
    config = tied_config(tmp_path)
    assert rows_can_leave(config, 0.1)
    assert not rows_can_leave(tied_config(tmp_path, skip_zero_advantage=False), 0.0)
    assert not rows_can_leave(tied_config(tmp_path, kl_in="loss"), 0.1)
    assert rows_can_leave(tied_config(tmp_path, kl_in="loss"), 0.0)
    assert not rows_can_leave(tied_config(tmp_path, entropy_coef=0.01), 0.0)
    assert not rows_can_leave(tied_config(tmp_path, advantage="gae"), 0.0)
    assert rows_can_leave(tied_config(tmp_path, advantage="gae", skip_zero_advantage=True), 0.0)


def test_a_run_in_which_rows_leave_is_the_run_in_which_they_stay(tmp_path):
    runs = {}
    for skip in (True, False):
        config = tied_config(tmp_path / str(skip), skip_zero_advantage=skip, iterations=2, optimizer=UNCLIPPED)
        with tied_trainer(config) as run:
            runs[skip] = [run.step() for _ in range(2)], tiny.parameters(run.actor)
    (less, weights), (full, expected) = runs[True], runs[False]
    assert less[0].zero_advantage_fraction > 0.2 and full[0].zero_advantage_fraction == 0.0
    for own, other in zip(less, full, strict=True):
        assert own.policy_loss == pytest.approx(other.policy_loss, abs=1e-5)
        assert own.grad_norm_actor == pytest.approx(other.grad_norm_actor, rel=1e-4)
    # Adam divides gradients near 0 by their own size, so weights agree less than gradients.
    assert tiny.gap(weights, expected)[0] <= 1e-4


def test_learning_rate_0_keeps_the_ratio_within_a_millionth_where_rows_leave(tmp_path):
    with tied_trainer(tied_config(tmp_path / "run", optimizer=OptimizerConfig(lr=0.0))) as run:
        for _ in range(2):
            step = run.step()
            assert step.zero_advantage_fraction > 0 and step.grad_norm_actor > 0
            assert step.ratio_min == pytest.approx(1.0, abs=1e-6) and step.ratio_max == pytest.approx(1.0, abs=1e-6)
            assert step.clip_fraction == 0.0


@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_an_iteration_whose_rows_all_leave_takes_its_steps_along_no_gradient(level, tmp_path):
    correction = {"correction": "dis", "correction_level": level} if level else {}
    config = tied_config(tmp_path / "run", iterations=1, **correction)
    with tied_trainer(config, reward=lambda samples: [0.5] * len(samples)) as run:
        before = tiny.parameters(run.actor)
        step = run.step()
        assert step.zero_advantage_fraction == 1.0 and step.grad_norm_actor == 0.0 and step.policy_loss == 0.0
        assert (step.ratio_min, step.ratio_max, step.skipped_steps) == (1.0, 1.0, 0)
        # There is no ratio to the rollout of a pass that read no token.
        assert step.correction_ratio_mean is step.correction_ratio_max is step.correction_fraction is None
        assert not any("ratio of new" in message for message in run.alarm_messages)
        assert tiny.gap(tiny.parameters(run.actor), before)[0] <= 1e-6
