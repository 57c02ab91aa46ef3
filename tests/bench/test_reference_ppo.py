"""The reference path of the benchmarks computes what the engine computes: same weights, same answers, same result."""

import copy

import pytest
import torch
from transformers import LlamaForSequenceClassification

from bench.reference_ppo.padding import Episode, left_padded, padded_batches
from bench.reference_ppo.trainer import ReferencePPO, reward_model_score
from icegrt.config import CriticConfig, OptimizerConfig
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny

BOUND = 1e-4
KEYS = {"kl_coef": 0.2, "lam": 0.9, "gamma": 0.98, "score_scale": False, "score_clip": 0.0, "iterations": 2}


class Recorder:
    """Keeps the experience of each iteration."""

    def __init__(self):
        self.experiences = []

    def on_scores(self, trainer, experience):
        self.experiences.append(experience)


def optimizer(**changes):
    # A large epsilon: Adam's first step is else the sign of each gradient, whatever its size.
    return OptimizerConfig(lr=5e-3, eps=1e-3, **changes)


def critic_of(actor):
    """Return the critic that `critic.init=actor` means: the actor's trunk with a zero head."""
    critic = LlamaForSequenceClassification(tiny.model_config(num_labels=1)).eval()
    critic.model.load_state_dict(actor.model.state_dict())
    torch.nn.init.zeros_(critic.score.weight)
    return critic


def step_order(trainer, experience, iteration):
    """Return the responses of each of the actor's optimizer steps."""
    batches, plan = experience.plan.batches, experience.plan
    ends = torch.tensor([len(batch.cu_actions) - 1 for batch in batches]).cumsum(0).tolist()
    members = [plan.rank_assignment[0][end - len(b.cu_actions) + 1 : end] for b, end in zip(batches, ends, strict=True)]
    updater = trainer.components.updater
    orders = [updater._minibatch_order(iteration, epoch) for epoch in range(trainer.config.ppo_epochs)]
    return [[n for i in plan.minibatches[m] for n in members[i]] for order in orders for m in order]


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_advantages_losses_and_weights_are_those_of_the_engine(tmp_path, schedule, temperature):
    # Nudged: the pad token's embedding is else 0, where the gradient of a norm is its largest.
    actor, reward = tiny.nudged(tiny.causal_lm(0), 0.05), tiny.scorer(1)
    reference = tiny.nudged(actor, 0.02)
    critic = critic_of(actor)
    config = tiny.ppo_config(
        tmp_path / "run",
        temperature=temperature,
        optimizer=optimizer(schedule=schedule),
        critic=CriticConfig(init="actor", optimizer=optimizer(schedule=schedule)),
        **KEYS,
    )
    score = reward_model_score(reward, 3, tiny.PAD)
    ours = ReferencePPO(
        config, copy.deepcopy(actor), reference, critic, score, pad_id=tiny.PAD, eos_ids=[tiny.EOS], rows=3
    )
    recorder = Recorder()
    arguments = actor, tiny.tokenizer(), reward, tiny.PROMPTS
    with PPOTrainer(config, *arguments, reference=reference, callbacks=[recorder]) as trainer:
        for iteration in (1, 2):
            row = trainer.step()
            experience = recorder.experiences[-1]
            responses = experience.plan.responses
            episodes = [Episode(list(r.prompt), list(r.tokens), r.truncated) for r in responses]
            order = step_order(trainer, experience, iteration)
            result = ours.step([], episodes=episodes, order=order)
            # 1. Advantages and returns.
            for name, streams in (("advantage_A", result.advantages), ("return_A", result.returns)):
                expected = experience.plan.all_gather_actions(getattr(experience.shaped, name))
                torch.testing.assert_close(torch.cat(streams), torch.cat(expected), rtol=BOUND, atol=BOUND)
            # 2. Losses: means over the tokens of all steps.
            tokens = torch.tensor([sum(len(responses[n].tokens) for n in step) for step in order], dtype=torch.float)
            for losses, expected in ((result.policy_losses, row.policy_loss), (result.value_losses, row.value_loss)):
                mean = (torch.tensor(losses) * tokens).sum() / tokens.sum()
                assert mean.item() == pytest.approx(expected, rel=BOUND, abs=BOUND)
            # 3. Weights.
            for role, model in ((trainer.actor, ours.actor), (trainer.critic, ours.critic)):
                weights = tiny.by_hugging_face_name(role, lambda p: p.detach())
                expected = {name: p.detach() for name, p in model.named_parameters()}
                assert tiny.gap(weights, expected)[1] < BOUND
    moved = tiny.gap(dict(ours.actor.named_parameters()), dict(actor.named_parameters()))[0]
    assert moved > 30 * BOUND  # the steps are much larger than the bound


def test_sampled_answers_end_at_their_first_eos():
    actor = tiny.causal_lm(0)
    config = tiny.ppo_config("unused", max_new_tokens=12)
    path = ReferencePPO(
        config, actor, actor, tiny.scorer(), lambda e: [0.0] * len(e), pad_id=tiny.PAD, eos_ids=[tiny.EOS], rows=5
    )
    torch.manual_seed(0)
    episodes = path._rollout([[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]])
    assert len(episodes) == 8 and {len(e.prompt) for e in episodes} == {1, 2, 3, 4}
    for episode in episodes:
        assert 1 <= len(episode.answer) <= 12 and tiny.EOS not in episode.answer[:-1]
        assert episode.truncated == (episode.answer[-1] != tiny.EOS)
    assert {e.truncated for e in episodes} == {True, False}


def test_batches_by_length_have_less_padding_and_the_same_episodes():
    lengths = [1, 9, 2, 8, 3, 7]
    episodes = [Episode([4], [5] * n) for n in lengths]
    plain, by_length = (padded_batches(episodes, range(6), 2, 0, by_length=order) for order in (False, True))
    assert sorted(n for batch in by_length for n in batch.members) == list(range(6))
    assert [batch.tokens_NL.shape[1] for batch in plain] == [10, 9, 8]
    assert [batch.tokens_NL.shape[1] for batch in by_length] == [3, 8, 10]
    for batch in (*plain, *by_length):
        assert batch.answer_NL.sum(1).tolist() == [lengths[n] for n in batch.members]


def test_prompts_are_padded_on_the_left():
    tokens_NL, mask_NL = left_padded([[3, 4, 5], [6]], 0)
    assert tokens_NL.tolist() == [[3, 4, 5], [0, 0, 6]] and mask_NL.tolist() == [[1, 1, 1], [0, 0, 1]]
