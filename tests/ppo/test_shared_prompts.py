"""Prompts that are drawn whole into minibatches: composition, the budget, rows computed once, and the same numbers."""

import math
import types
from collections import Counter

import pytest
import torch

from icegrt.config import OptimizerConfig, RewardCallConfig
from icegrt.errors import ConfigError
from icegrt.model.attention import AttentionMetadata
from icegrt.model.trunk import Trunk
from icegrt.packing import Share, unpack
from icegrt.ppo.batch_plan import group_by_prompt, plan_batches, split_for_ranks, split_group
from icegrt.ppo.trainer import PPOTrainer
from icegrt.rollout.types import Response
from tests.helpers import tiny_models as tiny
from tests.helpers.shared_prompts import SharedAndUnshared

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def response(number, prompt_index, prompt, n_tokens):
    return Response(prompt_index, number, number, prompt, [9] * n_tokens, [-1.0] * n_tokens, "stop")


@st.composite
def samples(draw):
    """Responses to a few prompts of which some are equal, and a budget that every sequence fits."""
    prompts = draw(st.lists(st.lists(st.integers(3, 4), min_size=1, max_size=4), min_size=1, max_size=5))
    count = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 6), min_size=len(prompts) * count, max_size=len(prompts) * count))
    pairs = [(index, prompt) for index, prompt in enumerate(prompts) for _ in range(count)]
    responses = [response(n, *pair, length) for n, (pair, length) in enumerate(zip(pairs, lengths, strict=True))]
    return responses, draw(st.integers(max(len(r.prompt) + len(r.tokens) for r in responses), 40))


def seen_by(rank, ranks, **share):
    """A cluster as the plan of one of several data-parallel ranks reads it."""
    return types.SimpleNamespace(share=Share(ranks, rank, **share))


# -- the plan ----------------------------------------------------------------------------------------------------------


@hypothesis.given(samples(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_every_prompt_is_in_one_minibatch_and_as_rarely_as_the_budget_allows(drawn, minibatches, ranks, seed):
    responses, budget = drawn
    plans = [
        plan_batches(
            responses, budget, minibatches, minibatch_by="prompt", cluster=seen_by(rank, ranks, round_to=2), seed=seed
        )
        for rank in range(ranks)
    ]
    alone = plan_batches(responses, 10**6, minibatches, minibatch_by="prompt", seed=seed)
    groups = {tuple(responses[group[0]].prompt): group for group in group_by_prompt(responses)}
    seen = Counter()
    for step in range(minibatches):
        texts, stored = [], Counter()
        for plan in plans:
            for index in plan.minibatches[step]:
                batch = plan.batches[index]
                assert batch.n_tokens - batch.tail_tokens <= budget
                prompts, tokens = unpack(batch)
                texts += [(tuple(p.tolist()), len(t)) for p, t in zip(prompts, tokens, strict=True)]
                stored.update({tuple(p.tolist()) for p in prompts})
                assert batch.n_tokens - batch.tail_tokens == sum(map(len, {tuple(p.tolist()) for p in prompts})) + sum(
                    map(len, tokens)
                )
        # 1. An optimizer step sees the same sequences in every layout and under every budget.
        (expected,) = (alone.batches[i] for i in alone.minibatches[step])
        assert Counter(texts) == Counter((tuple(p.tolist()), len(t)) for p, t in zip(*unpack(expected), strict=True))
        # 2. A prompt is in the minibatch with all its responses. It is repeated only if they exceed the budget,
        # or if a rank would have none.
        for prompt, count in stored.items():
            total = sum(len(responses[n].tokens) for n in groups[prompt])
            room = budget - len(prompt)
            assert count >= (1 if total <= room else -(-total // room))
            assert count == 1 or total > room or sum(stored.values()) <= ranks
            seen[prompt] += 1
        idle = [all(not plan.batches[i].n_sequences for i in plan.minibatches[step]) for plan in plans]
        assert sum(idle) == max(0, ranks - len(texts))
    assert seen == Counter(dict.fromkeys(groups, 1))
    local = [n for plan in plans for n in plan.rank_assignment[plan.rank]]
    assert sorted(local) == list(range(len(responses)))
    assert all(plan.rank_assignment == plans[0].rank_assignment for plan in plans)


def test_a_prompt_is_repeated_rather_than_leave_a_rank_without_work():
    responses = [response(n, n // 6, [5 + n // 6] * 3, 2 + n // 6) for n in range(12)]
    units = [list(range(6)), list(range(6, 12))]
    assert split_for_ranks(units, responses, 2) == units
    assert split_for_ranks(units, responses, 3) == [units[0], [6, 7, 8], [9, 10, 11]]
    assert split_for_ranks(units, responses, 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert split_for_ranks(units, responses, 100) == [[n] for n in range(12)]
    assert split_for_ranks([], responses, 2) == []


@hypothesis.given(samples())
def test_a_group_beyond_the_budget_is_split_into_the_fewest_even_parts(drawn):
    responses, budget = drawn
    for group in group_by_prompt(responses):
        parts = split_group(group, responses, budget)
        assert sorted(n for part in parts for n in part) == group
        tokens = [len(responses[group[0]].prompt) + sum(len(responses[n].tokens) for n in part) for part in parts]
        assert max(tokens) <= budget
        lengths = sorted(len(responses[n].tokens) for n in group)
        assert len(parts) == 1 or sum(lengths) > budget - len(responses[group[0]].prompt)
        assert max(tokens) - min(tokens) <= lengths[-1]


def test_the_responses_of_a_micro_batch_keep_the_order_of_sampling():
    responses = [response(n, n // 2, [5 + n // 2], 2) for n in range(8)]
    plan = plan_batches(responses, 100, 2, minibatch_by="prompt", seed=3)
    members = micro_batches(plan)
    assert members == [sorted(each) for each in members]
    assert [len(each) for each in members] == [4, 4]
    assert all(n ^ 1 in each for each in members for n in each)


def micro_batches(plan):
    """The indices of the responses of each micro-batch of a plan for one rank."""
    counts = [batch.n_sequences for batch in plan.batches]
    return [part.tolist() for part in torch.tensor(plan.rank_assignment[0]).split(counts)]


def test_equal_prompts_of_several_rows_are_one_group():
    responses = [response(n, n // 2, [7, 7], 1) for n in range(4)] + [response(4, 2, [7], 1)]
    assert group_by_prompt(responses) == [[0, 1, 2, 3], [4]]
    plan = plan_batches(responses, 100, minibatch_by="prompt")
    assert plan.n_tokens == 2 + 4 + 1 + 1


def test_by_response_nothing_is_shared():
    responses = [response(n, 0, [7, 7], 1) for n in range(4)]
    (batch,) = plan_batches(responses, 100).batches
    assert (batch.n_tokens, batch.group_sizes) == (12, [])


@pytest.mark.parametrize("prompts", [1, 2])
def test_more_minibatches_than_prompts_are_refused_with_their_keys(tmp_path, prompts):
    counts = {"minibatches": 3, "prompts_per_iteration": prompts, "samples_per_prompt": 4}
    config = tiny.ppo_config(tmp_path, minibatch_by="prompt", **counts)
    with pytest.raises(ConfigError) as error:
        PPOTrainer(config, tiny.causal_lm(), tiny.tokenizer(), tiny.count_letters, tiny.PROMPTS)
    for part in ("ppo.minibatches is 3", f"only {prompts} prompts", "ppo.minibatch_by=response"):
        assert part in str(error.value)


# -- whole iterations --------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path, cluster):
    opened = []

    def make(callbacks=(), reward=None, family="llama", sizes=None, reward_calls=None, **config):
        config |= {"reward": reward_calls} if reward_calls else {}
        config = tiny.ppo_config(
            tmp_path / f"run{len(opened)}", **({"minibatch_by": "prompt", "samples_per_prompt": 3} | config)
        )
        sizes = sizes or {}
        reward = reward or [tiny.scorer(1, family, **sizes), tiny.count_letters]
        actor = tiny.causal_lm(0, family, **sizes)
        opened.append(PPOTrainer(config, actor, tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


class RowCounter:
    """Rows that each role's trunk computes outside of the rollout, by forward pass."""

    def __init__(self, monkeypatch):
        self.rows = Counter()
        self.run = None
        forward = Trunk.forward

        def counted(trunk, tokens_T, positions_T, metadata):
            if type(metadata) is AttentionMetadata:  # the rollout has metadata of its own
                self.rows[self.name_of(trunk), torch.is_grad_enabled()] += len(tokens_T)
            return forward(trunk, tokens_T, positions_T, metadata)

        monkeypatch.setattr(Trunk, "forward", counted)

    def name_of(self, trunk):
        (name,) = (n for n, role in self.run.components.roles.items() if trunk in role.model.chunks)
        return name


def test_in_an_iteration_each_prompt_is_computed_once_per_pass_for_all_its_responses(trainer, monkeypatch):
    plans = []
    recorder = types.SimpleNamespace(on_scores=lambda run, experience: plans.append(experience.plan))
    counter = RowCounter(monkeypatch)
    counter.run = run = trainer([recorder], samples_per_prompt=8, token_budget=400, ppo_epochs=2)
    run.step()
    responses = plans[0].responses
    prompts = {r.prompt_index: len(r.prompt) for r in responses}
    assert len(responses) == 8 * len(prompts) == 32
    rows = sum(prompts.values()) + sum(len(r.tokens) for r in responses)
    assert rows < 0.7 * sum(len(r.prompt) + len(r.tokens) for r in responses)
    inference = {(name, False): rows for name in run.components.roles}
    update = {("actor", True): 2 * rows, ("critic", True): 2 * rows}
    assert {role.split("/")[0] for role, _ in inference} >= {"actor", "reference", "critic"}
    assert len(inference) == 4
    assert counter.rows == inference | update


def check_passes(trainer, steps=2, **config):
    comparison = SharedAndUnshared()
    run = trainer([comparison], **config)
    rows = [run.step() for _ in range(steps)]
    assert len(comparison.plans) == steps
    assert all(any(b.group_sizes for b in plan.batches) for plan in comparison.plans)
    return rows, comparison.plans


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_shared_and_unshared_passes_of_a_plan_agree(trainer, kl_in):
    check_passes(trainer, kl_in=kl_in, entropy_coef=0.01)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_with_recomputation_they_agree(trainer, recompute):
    check_passes(trainer, 1, run={"recompute": recompute})


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}),
        ("llama", {"num_key_value_heads": 1}),
    ],
    ids=["windows", "windows above", "one key head"],
)
def test_families_agree(trainer, family, sizes):
    check_passes(trainer, 1, family=family, sizes=sizes)


def test_dropped_responses_agree(trainer):
    def fails(samples):
        return [math.nan if s.index == 1 else float(len(s.tokens)) for s in samples]

    rewards = {"reward": [tiny.scorer(1), fails]}
    (step,), (plan,) = check_passes(trainer, 1, reward_calls=RewardCallConfig(on_error="drop"), **rewards)
    assert step.dropped_responses == 4
    assert plan.mask_A is not None and not bool(plan.mask_A.all())


def test_groups_beyond_the_budget_agree(trainer):
    _, plans = check_passes(trainer, 1, token_budget=24, samples_per_prompt=4)
    prompts = [
        tuple(p.tolist()) for b in plans[0].batches for p in {tuple(p.tolist()): p for p in unpack(b)[0]}.values()
    ]
    assert len(prompts) > len(set(prompts)) == 4


def test_the_ratio_is_1_at_rest(trainer):
    run = trainer(optimizer=OptimizerConfig(lr=0.0))
    for _ in range(2):
        step = run.step()
        assert (step.ratio_min, step.ratio_max) == (1.0, 1.0)
        assert step.kl_nats_per_response == 0.0 and step.grad_norm_actor > 0


def test_bf16_keeps_the_ratio_too(trainer):
    step = trainer(optimizer=OptimizerConfig(lr=0.0), run={"dtype": "bf16"}).step()
    assert (step.ratio_min, step.ratio_max) == (1.0, 1.0)
