"""Counted work of an iteration without inference passes that the update serves: what is gone, and nothing instead."""

import pytest

from icegrt.rehearsal.phases import ACTOR, ADVANTAGES, CRITIC, INFERENCE
from tests.helpers.rehearsals import copies_to_device, rehearse_rank, small_config, write_model

REUSE = ("ppo.reuse_update_logprob=true",)
SAVED = (*REUSE, "ppo.kl_logprobs=rollout")
VALUES = ("ppo.reuse_update_values=true",)


def flops(counts, phase):
    return sum(counts.watcher.phases[phase].product_flops.values())


def products_by_hand(counts, heads):
    """FLOPs of the matrix products of one forward pass of the small model over the iteration's rows."""
    hidden, inner, vocabulary, layers, kv = 64, 128, 1024, 4, 32
    per_token = layers * 2 * hidden * (hidden + 2 * kv + hidden + 3 * inner)
    return counts.tokens * per_token + heads * 2 * hidden * vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("rehearsed") / "model")


def test_the_saved_pass_is_one_forward_of_four(model):
    full, saved = (rehearse_rank(small_config(model, *keys), world_size=1) for keys in (REUSE, SAVED))
    gone = flops(full, INFERENCE) - flops(saved, INFERENCE)
    # Attention aside, which depends on lengths: a trunk and the logits of all responses.
    actions = 8 * 2 * 32
    assert products_by_hand(full, actions) <= gone <= 1.4 * products_by_hand(full, actions)
    # Two of four forward passes have a head over the vocabulary: those of actor and reference.
    assert 0.25 < gone / flops(full, INFERENCE) < 0.5
    assert flops(full, ACTOR) == flops(saved, ACTOR)
    assert saved.watcher.phases[INFERENCE].syncs == full.watcher.phases[INFERENCE].syncs


def test_the_critics_saved_pass_is_one_forward_of_four_and_nothing_came_instead(model):
    full, saved = (rehearse_rank(small_config(model, *keys), world_size=1) for keys in ((), VALUES))
    gone = flops(full, INFERENCE) - flops(saved, INFERENCE)
    # Attention aside, which depends on lengths: a trunk, with a head of one output.
    trunk = products_by_hand(full, 0)
    assert trunk <= gone <= 1.5 * trunk
    assert 0.1 < gone / flops(full, INFERENCE) < 0.25
    for phase in (ACTOR, ADVANTAGES):
        assert flops(full, phase) == flops(saved, phase)
    # The head reads the last token of each response beside the responses' tokens; a backward pass does not follow it.
    assert flops(saved, CRITIC) - flops(full, CRITIC) == 2 * 64 * 8 * 2
    for phase in (INFERENCE, ADVANTAGES, ACTOR, CRITIC):
        before, after = (counts.watcher.phases[phase] for counts in (full, saved))
        assert after.syncs == before.syncs and copies_to_device(after)[0] == copies_to_device(before)[0]
    assert copies_to_device(after)[0] == 0  # forming returns within the critic's step makes the host wait for no copy


@pytest.mark.parametrize("keys", [(), VALUES], ids=["inference", "update"])
def test_turns_cost_what_tokens_cost(model, keys):
    """Matrix products, waits of the host and blocking copies; kernels beside the products may differ."""
    tokens, turns = (
        rehearse_rank(small_config(model, f"ppo.advantage_unit={unit}", *keys), world_size=1)
        for unit in ("token", "turn")
    )
    for phase in (INFERENCE, ADVANTAGES, ACTOR, CRITIC):
        assert flops(turns, phase) == flops(tokens, phase)
        before, after = (counts.watcher.phases[phase] for counts in (tokens, turns))
        assert after.syncs == before.syncs and copies_to_device(after) == copies_to_device(before)
    assert flops(turns, CRITIC) > 0 and turns.micro_batches > 1


def test_dis_of_tokens_costs_what_ppo_costs_and_dis_of_responses_one_product_more(model):
    ppo, tokens, responses = (
        rehearse_rank(small_config(model, *keys), world_size=1)
        for keys in ((), ("ppo.correction=dis", "ppo.kl_logprobs=rollout"),
                     ("ppo.correction=dis", "ppo.kl_logprobs=rollout", "ppo.correction_level=sequence"))
    )  # fmt: skip
    actions = 8 * 2 * 32
    assert flops(tokens, ACTOR) == flops(ppo, ACTOR)
    assert flops(responses, ACTOR) - flops(ppo, ACTOR) == 2 * 64 * 1024 * actions
    assert copies_to_device(responses.watcher.phases[ACTOR])[0] == 0  # no copy that the host waits for
    assert responses.watcher.phases[ACTOR].syncs == tokens.watcher.phases[ACTOR].syncs


@pytest.mark.parametrize(("sharing", "products"), [("full", 3), ("lora", 2)])
def test_a_frozen_head_forms_no_gradient_of_its_weight(sharing, products, tmp_path):
    """Logits, dX and, if the head trains, dW: operations of the update grow with the vocabulary by so many products."""
    small, large = (
        flops(
            rehearse_rank(
                small_config(
                    write_model(tmp_path / str(size), vocab_size=size), f"ppo.sharing={sharing}", "ppo.reward_model=",
                    "ppo.reward_function=rewards.py:score", "ppo.critic.init=actor",
                ),
                world_size=1,
            ),
            ACTOR,
        )
        for size in (1024, 2048)
    )  # fmt: skip
    assert large - small == products * 2 * 64 * 1024 * (8 * 2 * 32)
