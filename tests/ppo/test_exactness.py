"""What must hold to the bit, or to the last digits of fp32: ratio 1 at rest, K micro-batches as one, steps skipped."""

import math
from types import SimpleNamespace

import pytest
import torch

from icegrt.config import CriticConfig, DataSource, OptimizerConfig
from icegrt.data import Example, Ranking
from icegrt.errors import RunError
from icegrt.kernels import PolicyStats, ShapedGAE
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.experience import Experience, compute_advantages
from icegrt.ppo.scores import total_scores
from icegrt.ppo.scoring import LogprobScorer, score_values
from icegrt.ppo.trainer import PPOTrainer
from icegrt.ppo.update import Updater
from icegrt.roles.micro_batch import LossOutput, MicroBatch, merge_by_type
from icegrt.training.ranking_loss import RewardModelLoss, pack_rankings
from icegrt.training.sft_loss import SFTLoss, pack_examples
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")

AT_REST = OptimizerConfig(lr=0.0)
UNCLIPPED = OptimizerConfig(lr=1e-2, clip_grad=0.0)
CHUNK = 16
SCORER = LogprobScorer(1.0, CHUNK)


@pytest.fixture(scope="module")
def models():
    return SimpleNamespace(actor=tiny.causal_lm(0), reward=tiny.scorer(1))


@pytest.fixture
def trainer(models, tmp_path):
    """Make trainers of a run that would go on for long; close them at the end."""
    opened = []

    def make(reward=None, callbacks=(), **config):
        config = tiny.ppo_config(
            tmp_path / f"run{len(opened)}", **({"iterations": 50, "checkpoint_every": 50} | config)
        )
        reward = reward or [models.reward, tiny.count_letters]
        opened.append(PPOTrainer(config, models.actor, tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


class OnScores:
    """A callback between scoring and update."""

    def __init__(self, act):
        self.on_scores = act


# -- at rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_learning_rate_0_keeps_ratio_1_and_kl_0_exactly(trainer, dtype, temperature):
    run = trainer(optimizer=AT_REST, temperature=temperature, run={"dtype": dtype})
    before = tiny.parameters(run.actor)
    for _ in range(3):
        step = run.step()
        assert (step.ratio_min, step.ratio_max) == (1.0, 1.0)
        assert step.kl_nats_per_response == 0.0
        assert step.clip_fraction == 0.0 and step.approx_kl_nats_per_token == 0.0
        assert step.skipped_steps == 0 and step.grad_norm_actor > 0
        assert step.rollout_logprob_gap_max < (1e-4 if dtype == "fp32" else 0.2)
    assert tiny.same(tiny.parameters(run.actor), before)


def test_one_weight_moved_by_a_thousandth_between_the_passes_moves_the_ratio(trainer):
    # Were the old log-probs taken from the update itself, the ratio would stay 1 whatever happens in between.
    def move(run, experience):
        with torch.no_grad():
            run.actor.model.chunks[-1].decoder.final_layernorm.weight[0] += 1e-3

    step = trainer(optimizer=AT_REST, callbacks=[OnScores(move)]).step()
    assert step.ratio_min < 1.0 - 1e-6 and step.ratio_max > 1.0 + 1e-6
    assert step.ratio_min > 0.5 and step.ratio_max < 2.0


def test_the_first_minibatch_of_a_learning_run_has_ratio_1(trainer):
    run = trainer()
    outcomes = []
    original = run.components.updater.run
    run.components.updater.run = lambda *args, **options: outcomes.append(original(*args, **options)) or outcomes[-1]
    step = run.step()
    first = merge_by_type(outcomes[0].actor[0].stats)[PolicyStats]
    assert float(first.ratio_min) == 1.0 == float(first.ratio_max)
    assert step.ratio_max > 1.0 and len(outcomes[0].actor) == len(outcomes[0].critic) == 4


# -- K micro-batches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assembled(models, cluster):
    """Experience under any token budget, the figures of each response always the same."""
    config = tiny.ppo_config("unused", kl_in="loss", kl_coef=0.1)
    answers = tiny.responses(12, seed=8)
    batch_plan = plan_batches(answers, 4096, 1)
    actor, critic = tiny.role(models.actor), tiny.role(models.reward, "scalar")
    old, entropy = SCORER(actor, batch_plan.batches, entropy=True)
    value, last = score_values(critic, batch_plan.batches)
    noise = torch.Generator().manual_seed(1)
    old = old + 0.2 * torch.randn(old.shape, generator=noise)
    ref = old + 0.2 * torch.randn(old.shape, generator=noise)
    scores = total_scores(config, {}, [], torch.arange(12.0), torch.zeros(12))
    shaped = compute_advantages(config, 0.1, batch_plan, scores, old, ref, value, last)
    lengths = batch_plan.cu_actions.diff().tolist()

    def under(budget, minibatches=1):
        plan = plan_batches(answers, budget, minibatches)

        def moved(x_A):
            parts = dict(zip((r.sequence_id for r in batch_plan.responses), x_A.split(lengths), strict=True))
            return torch.cat([parts[r.sequence_id] for r in plan.local_responses])

        gae = ShapedGAE(*(moved(x) for x in (shaped.advantage_A, shaped.return_A, shaped.reward_A)), shaped.kl_N,
                        shaped.moments)  # fmt: skip
        return Experience(plan, scores, moved(old), moved(entropy), moved(ref), moved(value), gae, shaped.moments)

    return config, under


def assert_equal_gradients(gradients, expected, at_most=1e-6):
    assert tiny.gap(gradients, expected)[0] <= at_most


def test_the_policy_gradient_is_that_of_one_micro_batch(assembled, models, cluster):
    config, under = assembled
    actor = tiny.role(models.actor, learns=UNCLIPPED)
    gradients = []
    for budget in (4096, 17):
        experience = under(budget)
        updater = Updater(config, actor, actor, SCORER, cluster)
        work = updater.policy_work(experience, range(len(experience.plan.batches)), 0.1)
        gradients.append(tiny.gradients(actor, work))
    assert len(work) > 5
    assert_equal_gradients(gradients[1], gradients[0])


def test_the_value_gradient_is_that_of_one_micro_batch(assembled, models, cluster):
    config, under = assembled
    critic = tiny.role(tiny.nudged(models.reward, 0.03), "scalar", learns=UNCLIPPED)
    gradients = []
    for budget in (4096, 17):
        experience = under(budget)
        updater = Updater(config, critic, critic, SCORER, cluster)
        work = updater.critic_work(experience, range(len(experience.plan.batches)))
        gradients.append(tiny.gradients(critic, work))
    assert_equal_gradients(gradients[1], gradients[0])


def examples(count=6):
    unmasked = [Example(r.prompt, r.tokens, None, "row", {}) for r in tiny.responses(count, seed=21)]
    masked = [n % 3 != 1 for n in range(len(unmasked[0].response))]
    return [Example(unmasked[0].prompt, unmasked[0].response, masked, "row", {}), *unmasked[1:]]


def supervised_gradient(actor, rows, budget):
    loss = SFTLoss(actor, CHUNK)
    return tiny.gradients(actor, [MicroBatch(batch, loss) for batch in pack_examples(rows, budget)])


def test_the_sft_gradient_is_that_of_one_micro_batch(models):
    actor = tiny.role(models.actor, learns=UNCLIPPED)
    one_batch, many_batches = (supervised_gradient(actor, examples(), budget) for budget in (4096, 17))
    assert_equal_gradients(many_batches, one_batch)


def test_the_ranking_gradient_is_that_of_one_micro_batch(models):
    critic = tiny.role(models.reward, "scalar", learns=UNCLIPPED)
    answers = [r.tokens for r in tiny.responses(12, seed=5)]
    scores = ([2.0, 1.0, 1.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0], [0.5, -1.0, 2.0])  # the third has no pair
    rankings = [Ranking([4 + n, 5], answers[3 * n : 3 * n + 3], list(scores[n]), "row") for n in range(4)]
    gradients = []
    for budget in (4096, max(map(len, rankings))):
        ranked = pack_rankings(rankings, budget, 0.0)
        loss = RewardModelLoss(critic)
        gradients.append(tiny.gradients(critic, [MicroBatch(batch, loss) for batch in ranked]))
    assert len(ranked) > 2
    assert_equal_gradients(gradients[1], gradients[0])


@pytest.mark.parametrize("budget", [4096, 17])
def test_ptx_adds_its_mean_gradient_times_the_coefficient(budget, assembled, models, cluster):
    plain, under = assembled
    experience = under(budget)
    config = tiny.ppo_config(
        "unused", kl_in="loss", kl_coef=0.1, ptx_coef=0.4, ptx_data=[DataSource(path="text")], token_budget=budget,
        ppo_epochs=1, minibatches=1,
    )  # fmt: skip
    mixed, unmixed = (tiny.role(models.actor, learns=UNCLIPPED) for _ in range(2))
    critic = tiny.role(models.reward, "scalar", learns=UNCLIPPED)
    outcome = Updater(config, mixed, critic, SCORER, cluster).run(experience, 0.1, 1, [examples()])
    assert outcome.ptx_stats.tokens == sum(sum(e.action_mask or [1] * len(e.response)) for e in examples())
    updater = Updater(plain, unmixed, critic, SCORER, cluster)
    policy = tiny.gradients(unmixed, updater.policy_work(experience, range(len(experience.plan.batches)), 0.1))
    likelihood = supervised_gradient(unmixed, examples(), 4096)
    by_hand = {name: policy[name] + 0.4 * likelihood[name] for name in policy}
    assert_equal_gradients(tiny.by_hugging_face_name(mixed, lambda p: p.main_grad), by_hand)


def test_a_minibatch_is_one_step_whatever_the_micro_batches(assembled, models, cluster):
    _, under = assembled
    for budget in (4096, 30):
        config = tiny.ppo_config("unused", token_budget=budget, ppo_epochs=3, minibatches=2)
        actor = tiny.role(models.actor, learns=UNCLIPPED)
        critic = tiny.role(models.reward, "scalar", learns=UNCLIPPED)
        outcome = Updater(config, actor, critic, SCORER, cluster).run(under(budget, 2), 0.0, 1)
        assert len(outcome.actor) == len(outcome.critic) == 6
        assert float(outcome.policy_stats.count) == 3 * sum(len(r.tokens) for r in under(budget).plan.local_responses)


# -- steps not taken --------------------------------------------------------------------------------------------------


def test_critic_warm_up_leaves_the_actor_bit_identical(trainer):
    run = trainer(critic=CriticConfig(warmup_iterations=2, optimizer=OptimizerConfig(lr=1e-2)))
    before, critic = tiny.parameters(run.actor), tiny.parameters(run.critic)
    for _ in range(2):
        step = run.step()
        assert step.lr_actor == 0.0 and step.lr_critic > 0
        assert tiny.same(tiny.parameters(run.actor), before)
    assert not tiny.same(tiny.parameters(run.critic), critic)
    # The actor's decay begins where the actor does: 48 iterations of 4 steps, 3 of them before the last one here.
    assert run.step().lr_actor == pytest.approx(1e-2 * (1 - 3 / 192))
    assert not tiny.same(tiny.parameters(run.actor), before)


def test_the_critic_takes_its_own_number_of_passes(assembled, models, cluster):
    _, under = assembled
    experience = under(4096, 2)
    for critic_epochs, steps in ((3, 6), (1, 2), (0, 4)):
        config = tiny.ppo_config("unused", token_budget=4096, critic=CriticConfig(epochs=critic_epochs))
        actor = tiny.role(models.actor, learns=UNCLIPPED)
        critic = tiny.role(models.reward, "scalar", learns=UNCLIPPED)
        outcome = Updater(config, actor, critic, SCORER, cluster).run(experience, 0.0, 1)
        assert (len(outcome.actor), len(outcome.critic)) == (4, steps)


def test_a_critic_from_the_reward_model_starts_on_the_scale_of_the_reward(models, tmp_path):
    folder = tmp_path / "scored"
    models.reward.save_pretrained(folder)
    (folder / "score_statistics.json").write_text('{"after": {"count": 10, "mean": 3.0, "std": 4.0}}')
    config = tiny.ppo_config(tmp_path / "run", reward_model_weight=0.5)
    with PPOTrainer(config, models.actor, tiny.tokenizer(), str(folder), tiny.PROMPTS) as run:
        raw, critic = run.components.roles["reward"].model.head.weight, run.critic.model.head.weight
        assert raw.abs().max() > 0
        assert torch.equal(critic, raw * (0.5 / 4.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(trainer, value):
    def spoil(run, experience):
        experience.shaped.return_A[0] = value

    run = trainer(ppo_epochs=1, minibatches=1, callbacks=[OnScores(spoil)])
    before, actor = tiny.parameters(run.critic), tiny.parameters(run.actor)
    state = run.critic.schedule.state_dict()
    step = run.step()
    assert step.skipped_steps == 1
    assert tiny.same(tiny.parameters(run.critic), before) and run.critic.schedule.state_dict() == state
    assert not tiny.same(tiny.parameters(run.actor), actor)


def test_a_loss_that_overflows_under_a_finite_gradient_skips_the_step(models):
    critic = tiny.role(models.reward, "scalar", learns=UNCLIPPED)
    batch = plan_batches(tiny.responses(), 4096, 1).batches[0]
    before = tiny.parameters(critic)
    outcome = critic.train_step(
        [MicroBatch(batch, lambda hidden_TH, batch: LossOutput(hidden_TH.sum() * 0.0 + math.inf, 1))]
    )
    assert outcome.skipped and tiny.same(tiny.parameters(critic), before)


def test_three_spoilt_actor_steps_in_a_row_end_the_run(trainer):
    def spoil(run, experience):
        experience.shaped.advantage_A[0] = math.nan

    run = trainer(ppo_epochs=1, minibatches=1, callbacks=[OnScores(spoil)])
    before = tiny.parameters(run.actor)
    with pytest.raises(RunError, match="3 optimizer steps in a row"):
        for _ in range(4):
            run.step()
    assert run.done_steps == 3 and tiny.same(tiny.parameters(run.actor), before)


# -- scores, KL and what is reported of them --------------------------------------------------------------------------


def test_a_score_of_zero_is_a_score(trainer):
    experiences = []
    run = trainer(lambda samples: [0.0] * len(samples), [OnScores(lambda _, e: experiences.append(e))],
                  critic=CriticConfig(init="actor"))  # fmt: skip
    step = run.step()
    assert step.score_mean == 0.0 and step.function_score_mean == 0.0 and step.reward_model_score_mean is None
    assert torch.equal(experiences[0].scores.total_N, torch.zeros(8))


def test_the_kl_penalty_does_not_reach_the_scores_that_are_reported(trainer, models):
    experiences = []
    run = trainer(callbacks=[OnScores(lambda _, e: experiences.append(e))], kl_coef=5.0)
    run.step()
    step = run.step()
    experience = experiences[1]
    recomputed = total_scores(
        run.config, run.components.normalizers, experience.scores.models, experience.scores.source_total_N,
        experience.plan.truncated_N,
    )  # fmt: skip
    assert step.kl_nats_per_response != 0.0
    assert torch.equal(recomputed.total_N, experience.scores.total_N)
    assert step.score_mean == pytest.approx(experience.scores.total_N.double().mean().item(), abs=1e-12)
    paid = step.score_mean - 5.0 * step.kl_nats_per_response
    assert step.reward_mean == pytest.approx(paid, abs=1e-5)
