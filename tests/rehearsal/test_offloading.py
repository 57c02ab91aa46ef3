"""A rehearsal counts what leaves the device as free, and every move as a copy."""

import pytest
import torch

from icegrt.rehearsal import memory
from icegrt.rehearsal.counts import TO_DEVICE, TO_HOST
from icegrt.rehearsal.memory import Ledger
from icegrt.rehearsal.phases import ACTOR, CRITIC, DECODE, INFERENCE
from tests.helpers.rehearsals import rehearse_rank, small_config, write_model
from tests.rehearsal.test_memory import add

STATE = (memory.PARAMETERS, memory.GRADIENTS, memory.OPTIMIZER)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the counts of one of two data-parallel ranks by what is offloaded."""
    model = write_model(tmp_path_factory.mktemp("rehearsal") / "model")
    ranks = {
        choice: rehearse_rank(small_config(model, f"ppo.offload.roles={choice}"))
        for choice in ("none", "optimizer", "all")
    }
    more = {
        "host": ("ppo.optimizer.on_host=true", "ppo.critic.optimizer.on_host=true"),
        "prefetch": ("ppo.offload.roles=all", "ppo.offload.prefetch=true"),
        "layers": ("ppo.offload.roles=all", "ppo.offload.reference=layers", "ppo.offload.reward=layers"),
    }
    return ranks | {name: rehearse_rank(small_config(model, *keys)) for name, keys in more.items()}


def state_at_peak(rank, phase):
    """Return the bytes of parameters, gradients and optimizer state at the peak of a phase."""
    spans = rank.watcher.phases[phase].spans
    peak = max((rank.watcher.device.peak(start, stop) for start, stop, *_ in spans), key=lambda p: p.bytes)
    return [peak.by_category[category] for category in STATE]


def moved(rank, phase, direction):
    """Return the bytes that pinned copies moved, beyond those of a resident run."""
    copies = rank.watcher.phases[phase].copies.items()
    return sum(total.bytes for copy, total in copies if copy.direction == direction and copy.is_pinned)


def test_a_released_storage_is_free_until_it_is_restored():
    ledger, x, y = Ledger(), torch.empty(100, dtype=torch.uint8), torch.empty(30, dtype=torch.uint8)
    add(ledger, x)
    add(ledger, y)
    ledger.label(x, memory.PARAMETERS)
    start = ledger.mark()
    ledger.release(x.untyped_storage())
    released = ledger.mark()
    ledger.label(x, memory.OPTIMIZER)  # also without memory
    assert (ledger.bytes, ledger.peak(released).bytes) == (30, 30)
    ledger.restore(x.untyped_storage())
    peak = ledger.peak(start)
    assert (ledger.bytes, peak.bytes, peak.by_category[memory.OPTIMIZER]) == (130, 130, 100)
    ledger.release(x.untyped_storage())
    del x, y
    assert ledger.bytes == 0 and not ledger._released


def test_one_role_at_a_time_is_on_the_device(ranks):
    resident, offloaded = ranks["none"], ranks["all"]
    everything = state_at_peak(resident, INFERENCE)
    actor = state_at_peak(offloaded, ACTOR)
    critic = state_at_peak(offloaded, CRITIC)
    # Actor and reference have an LM head, critic and reward model have not.
    assert 2 * (actor[0] + critic[0]) == pytest.approx(everything[0], rel=0.02)
    assert actor[1] + critic[1] == everything[1]
    assert state_at_peak(offloaded, DECODE) == [actor[0], 0, 0]
    parameters, *rest = state_at_peak(offloaded, INFERENCE)
    assert rest == [0, 0] and parameters == pytest.approx(actor[0], rel=0.02)


def test_without_their_parameters_roles_release_gradients_and_optimizer_state(ranks):
    resident, offloaded = ranks["none"], ranks["optimizer"]
    parameters = state_at_peak(resident, INFERENCE)[0]
    assert state_at_peak(offloaded, INFERENCE) == [parameters, 0, 0]
    assert state_at_peak(offloaded, ACTOR)[:2] == [parameters, state_at_peak(ranks["all"], ACTOR)[1]]


def test_moves_are_copies_of_the_bytes_that_move(ranks):
    extra = {
        (phase, direction): moved(ranks["all"], phase, direction) - moved(ranks["none"], phase, direction)
        for phase in (INFERENCE, ACTOR, CRITIC)
        for direction in (TO_HOST, TO_DEVICE)
    }
    actor, critic = state_at_peak(ranks["all"], ACTOR), state_at_peak(ranks["all"], CRITIC)
    # Nothing has changed since the roles were built: reward model, critic, actor and reference come, and none goes.
    assert extra[INFERENCE, TO_HOST] == 0
    assert extra[INFERENCE, TO_DEVICE] == pytest.approx(2 * (actor[0] + critic[0]), rel=0.02)
    # The actor comes with its master weights; its gradients are zeros that no copy brings.
    assert extra[ACTOR, TO_HOST] == 0
    assert extra[ACTOR, TO_DEVICE] == pytest.approx(actor[0] + actor[2], rel=0.02)
    # Changed, it goes: bf16 weights, and this rank's half of master weights and two moments in fp32.
    assert extra[CRITIC, TO_HOST] == pytest.approx((2 + 12 / 2) / 2 * actor[0], rel=0.02)
    assert extra[CRITIC, TO_DEVICE] == pytest.approx(critic[0] + critic[2], rel=0.02)


def test_adam_on_the_host_leaves_parameters_and_gradients_and_moves_the_ranks_shard(ranks):
    resident, host = ranks["none"], ranks["host"]
    parameters, gradients, _ = state_at_peak(resident, ACTOR)
    assert state_at_peak(host, ACTOR) == [parameters, gradients, 0]
    weights = state_at_peak(ranks["all"], ACTOR)[0] / 2  # in bf16
    for direction in (TO_HOST, TO_DEVICE):  # this rank's half: its gradients go, its master weights come, both in fp32
        extra = moved(host, ACTOR, direction) - moved(resident, ACTOR, direction)
        assert extra == pytest.approx(4 * weights / 2, rel=0.02)


def test_prefetching_holds_the_next_role_beside_the_present_one(ranks):
    one, two = ranks["all"], ranks["prefetch"]
    actor, critic = state_at_peak(one, ACTOR), state_at_peak(one, CRITIC)
    # The critic comes while the actor trains, without its gradients; then the actor's parameters for the rollout.
    assert state_at_peak(two, ACTOR)[:2] == [actor[0] + critic[0], actor[1]]
    assert state_at_peak(two, CRITIC)[0] == critic[0] + actor[0]
    assert state_at_peak(two, ACTOR)[2] >= actor[2]
    total = {
        name: sum(moved(ranks[name], phase, TO_DEVICE) for phase in (DECODE, INFERENCE, ACTOR, CRITIC))
        for name in ("all", "prefetch")
    }
    # The moves are the same or fewer: the actor stays for its update while the reference computes.
    assert total["prefetch"] <= total["all"]


def test_streamed_roles_have_two_layers_on_the_device_and_move_them_for_every_micro_batch(ranks):
    whole, layers = ranks["all"], ranks["layers"]
    actor = state_at_peak(whole, ACTOR)[0]
    assert state_at_peak(layers, DECODE) == state_at_peak(whole, DECODE)
    assert state_at_peak(layers, INFERENCE)[0] == actor  # the actor, or the critic, whole
    extra = moved(layers, INFERENCE, TO_DEVICE) - moved(whole, INFERENCE, TO_DEVICE)
    assert layers.micro_batches > 1 and extra > 0
