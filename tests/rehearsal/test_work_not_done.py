"""Counted work of an iteration without the actor's inference pass: what is gone, and that nothing came instead."""

import pytest

from icegrt.rehearsal.phases import ACTOR, INFERENCE
from tests.helpers.rehearsals import copies_to_device, rehearse_rank, small_config, write_model

REUSE = ("ppo.reuse_update_logprob=true",)
SAVED = (*REUSE, "ppo.kl_logprobs=rollout")


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
