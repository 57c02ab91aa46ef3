"""Which passes of the actor an iteration runs, what stays exact without one, and what stays exact at rest."""

import pytest

from icegrt.config import OptimizerConfig, PPOConfig
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

AT_REST = OptimizerConfig(lr=0.0)
ONE_STEP = {"ppo_epochs": 1, "minibatches": 1}
REUSE = ONE_STEP | {"reuse_update_logprob": True}
REUSE_AND_ROLLOUT = REUSE | {"kl_logprobs": "rollout"}


@pytest.fixture(scope="module")
def models():
    return tiny.causal_lm(0), tiny.scorer(1)


@pytest.fixture
def trainer(models, tmp_path):
    """Make trainers; close them at the end."""
    opened = []

    def make(**config):
        settings = tiny.ppo_config(tmp_path / f"run{len(opened)}", iterations=50, checkpoint_every=50, **config)
        reward = [models[1], tiny.count_letters]
        opened.append(PPOTrainer(settings, models[0], tiny.tokenizer(), reward, tiny.PROMPTS))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


def passes_of_the_actor(run, monkeypatch):
    """Return a list that grows with every inference pass of the actor."""
    passes, score = [], run.actor.score

    def counted(*args):
        passes.append(len(args[0]))
        return score(*args)

    monkeypatch.setattr(run.actor, "score", counted)
    return passes


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (REUSE, 1),
        (REUSE_AND_ROLLOUT, 0),
        ({"correction": "tis"}, 1),
        ({"correction": "dis"}, 1),
        ({"correction": "dis", "kl_logprobs": "rollout"}, 0),
        ({"correction": "dis", "kl_in": "loss"}, 0),
        ({"correction": "dis", "correction_level": "sequence", "kl_coef": 0.0}, 0),
    ],
)
def test_inference_reads_the_actor_only_where_something_needs_it(settings, expected, trainer, monkeypatch):
    run = trainer(**settings)
    passes = passes_of_the_actor(run, monkeypatch)
    step = run.step()
    assert len(passes) == expected
    assert (step.rollout_logprob_gap_max is None) == (step.rollout_logprob_gap_mean is None) == (not expected)
    assert step.grad_norm_actor > 0 and step.skipped_steps == 0
    # Actor and reference are one model: the KL is 0, exactly if inference read it, else up to the rollout's rounding.
    assert step.kl_nats_per_response == (0.0 if expected else pytest.approx(0.0, abs=1e-4))


def test_without_kl_in_the_reward_the_saved_pass_changes_no_bit_of_the_update(trainer):
    runs = [trainer(**settings, kl_coef=0.0) for settings in (REUSE, REUSE_AND_ROLLOUT)]
    (first, second), (weights, others) = zip(*((run.step(), tiny.parameters(run.actor)) for run in runs), strict=True)
    assert tiny.same(weights, others)
    for name in ("ratio_min", "ratio_max", "policy_loss", "score_mean", "advantage_std", "grad_norm_actor"):
        assert getattr(first, name) == getattr(second, name), name
    # Samples estimate the entropy; that of the distributions is close.
    assert second.entropy_nats_per_token == pytest.approx(first.entropy_nats_per_token, rel=0.1)


def test_the_kl_of_the_rollouts_log_probs_gives_nearly_the_same_step(trainer):
    """A reference that is another model would show a KL that is missing."""
    runs = [trainer(**settings, kl_coef=0.5) for settings in (REUSE, REUSE_AND_ROLLOUT)]
    for _ in range(2):
        first, second = (run.step() for run in runs)
    assert abs(first.kl_nats_per_response) > 0.01
    assert second.kl_nats_per_response == pytest.approx(first.kl_nats_per_response, abs=1e-4)
    assert second.policy_loss == pytest.approx(first.policy_loss, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"correction": "tis", "loss_aggregation": "sequence", "positive_nll_coef": 0.1, "positive_nll_threshold": 0.1},
        {"correction": "tis", "correction_level": "sequence", "loss_aggregation": "constant", "overlong_buffer": 4},
        REUSE | {"correction": "tis", "loss_aggregation": "sequence"},
    ],
)
def test_learning_rate_0_keeps_ratio_1_and_kl_0_exactly(settings, trainer):
    run = trainer(optimizer=AT_REST, **settings)
    for _ in range(2):
        step = run.step()
        assert (step.ratio_min, step.ratio_max, step.kl_nats_per_response) == (1.0, 1.0, 0.0)
        # The rollout's log-probs are those of inference up to rounding.
        assert step.correction_ratio_mean == pytest.approx(1.0, abs=1e-4)
        assert 1.0 <= step.correction_ratio_max < 1.001 and step.correction_fraction == 0.0
        assert step.correction_sample_share == pytest.approx(1.0, abs=1e-4)
    if "positive_nll_coef" in settings:
        assert step.positive_nll > 0
    if "overlong_buffer" in settings:
        assert 0 < step.overlong_penalty_mean <= 1
    assert all("are truncated" in message for message in run.alarm_messages)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_dis_at_rest_has_the_ratio_to_the_rollout(level, trainer):
    run = trainer(optimizer=AT_REST, correction="dis", correction_level=level, kl_logprobs="rollout")
    step = run.step()
    assert step.correction_ratio_mean == pytest.approx(1.0, abs=1e-4) and step.correction_fraction == 0.0
    assert step.ratio_max == step.correction_ratio_max == pytest.approx(1.0, abs=1e-3)
    assert all("are truncated" in message for message in run.alarm_messages)


def test_a_run_with_the_rollouts_log_probs_resumes(trainer, tmp_path, models):
    """No statistic of corrections or losses outlives an iteration, so a checkpoint needs none."""
    settings = {"correction": "dis", "kl_logprobs": "rollout", "loss_aggregation": "sequence"}
    run = trainer(**settings)
    run.step()
    run.save_checkpoint()
    expected = run.step()
    config = tiny.ppo_config(run.dir, iterations=50, checkpoint_every=50, run={"resume": True}, **settings)
    run.close()
    again = PPOTrainer(config, models[0], tiny.tokenizer(), [models[1], tiny.count_letters], tiny.PROMPTS)
    try:
        step = again.step()
    finally:
        again.close()
    assert (step.policy_loss, step.ratio_max, step.score_mean) == (
        expected.policy_loss,
        expected.ratio_max,
        expected.score_mean,
    )


def test_the_passes_follow_from_the_configuration():
    assert PPOConfig().actor_is_inferred
    assert PPOConfig(correction="dis").actor_is_inferred
    assert not PPOConfig(correction="dis", kl_coef=0.0).actor_is_inferred
    assert not PPOConfig(correction="dis", kl_in="loss").actor_is_inferred
    assert PPOConfig(correction="tis", kl_coef=0.0).actor_is_inferred
    assert PPOConfig(**REUSE, kl_coef=0.0).actor_is_inferred  # opt-in: metrics stay what they were
    assert not PPOConfig(**REUSE_AND_ROLLOUT).actor_is_inferred
