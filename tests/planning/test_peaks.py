"""A rehearsal of the largest work has the peaks of a complete one, and plans have host and device by category."""

import pytest

from icegrt.planning.footprint import RankMemory, run_peaks
from icegrt.rehearsal import extent, memory
from icegrt.rehearsal.hardware import PRESETS
from icegrt.rehearsal.phases import ACTOR, BUILD, CRITIC, INFERENCE
from icegrt.rehearsal.rehearsal import rehearse
from icegrt.rehearsal.workload import Workload
from tests.helpers.rehearsals import small_config, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("peaks") / "model")


def footprints(model, *overrides, gpus=2, **options):
    """Return the memory of each kind of rank, with prompts and responses of unequal lengths."""
    config = small_config(model, "ppo.prompts_per_iteration=24", "ppo.minibatches=3", *overrides)
    prompts = [8 + 5 * (n % 9) for n in range(24)]
    responses = [4 + 7 * (n % 5) for n in range(48)]
    workload = Workload(prompts, responses, 2, 2, "unequal")
    found = rehearse(config, gpus=gpus, gpus_per_node=8, hardware=PRESETS["h100-80"], workload=workload, **options)
    return {rank.kind: RankMemory.of(rank) for rank in found.ranks}


@pytest.mark.parametrize(
    ("gpus", "overrides"),
    [
        (2, ["ppo.offload.roles=all"]),
        (2, ["ppo.parallel.tensor=2", "ppo.run.dtype=fp32", "ppo.minibatch_by=prompt"]),
        (4, ["ppo.parallel.pipeline=4", "ppo.token_budget=128", "ppo.run.recompute=full"]),
    ],
)
def test_the_largest_work_has_the_peaks_of_all_of_it(model, monkeypatch, gpus, overrides):
    shortened = footprints(model, *overrides, gpus=gpus, peaks_only=True)
    monkeypatch.setattr(extent, "_largest", lambda batches, count: list(range(len(batches))))
    monkeypatch.setattr(extent, "_chosen_steps", lambda steps, batches: steps)
    complete = footprints(model, *overrides, gpus=gpus, peaks_only=True)
    assert list(shortened) == list(complete)
    for kind, rank in complete.items():
        assert {n: p.device.bytes for n, p in shortened[kind].phases.items()} == {
            n: pytest.approx(p.device.bytes, rel=0.01) for n, p in rank.phases.items()
        }
        assert shortened[kind].host_bytes == pytest.approx(rank.host_bytes, rel=0.01)


def test_moments_exist_from_the_start(model):
    first, steady = footprints(model)["every rank"], footprints(model, peaks_only=True)["every rank"]
    trained = steady.phases[CRITIC].device.by_category[memory.OPTIMIZER]
    assert steady.phases[INFERENCE].device.by_category[memory.OPTIMIZER] == trained
    # Master weights alone: a third of the state in fp32.
    assert first.phases[INFERENCE].device.by_category[memory.OPTIMIZER] == pytest.approx(trained / 3, rel=0.02)


def test_a_plan_counts_a_smaller_critic(model, tmp_path):
    small = write_model(tmp_path / "small", num_hidden_layers=2)
    whole, part = (
        footprints(model, f"ppo.critic.model={path}", gpus=2, peaks_only=True)["every rank"].phases[CRITIC].device
        for path in (model, small)
    )
    # Weights and biases of attention, three projections of the MLP and two norms, in two layers.
    layers = 2 * (64 * (64 + 2 * 32) + (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64)
    saved = whole.by_category[memory.PARAMETERS] - part.by_category[memory.PARAMETERS]
    assert saved == pytest.approx(2 * layers, rel=0.02)


def test_a_plan_counts_what_the_critic_freezes(model):
    whole, part = (
        footprints(model, f"ppo.critic.freeze={frozen}", gpus=1, peaks_only=True)["every rank"].phases[CRITIC].device
        for frozen in ("[]", "[attention]")
    )
    # Weights and biases of queries, keys and values, and of the output projection, in four layers.
    attention = 4 * (64 * (64 + 2 * 32) + (64 + 2 * 32) + 64 * 64)
    # In bf16 a parameter that trains has a master weight, two moments and a gradient of 4 bytes each.
    for category, size in ((memory.OPTIMIZER, 12), (memory.GRADIENTS, 4), (memory.PARAMETERS, 0)):
        saved = whole.by_category[category] - part.by_category[category]
        assert saved == pytest.approx(size * attention, rel=0.02, abs=0.04 * attention), category


def test_the_host_has_the_copies_that_offloading_keeps(model):
    resident = footprints(model, peaks_only=True)["every rank"]
    for mode, categories in (("optimizer", [memory.OPTIMIZER]), ("all", [memory.OPTIMIZER, memory.PARAMETERS])):
        offloaded = footprints(model, f"ppo.offload.roles={mode}", peaks_only=True)["every rank"]
        state = sum(resident.phases[INFERENCE].device.by_category[name] for name in categories)
        copies = offloaded.phases[ACTOR].host.by_category[memory.OFFLOADED]
        assert copies == pytest.approx(state, rel=0.03)  # gradients are not kept
        assert offloaded.device_bytes < resident.device_bytes
    assert memory.OFFLOADED not in resident.phases[ACTOR].host.by_category


def test_categories_sum_to_the_peak_and_phases_of_a_run_take_the_largest(model):
    ranks = list(footprints(model, "ppo.parallel.pipeline=2", peaks_only=True).values())
    for rank in ranks:
        for phase in rank.phases.values():
            assert sum(phase.device.by_category.values()) == phase.device.bytes
        assert rank.device_bytes == max(phase.device.bytes for phase in rank.phases.values())
    peaks = run_peaks(ranks)
    assert set(peaks) == {"rollout", "score", "shape", "update"} and BUILD not in peaks
    assert peaks["update"] == max(rank.phases[name].device.bytes for rank in ranks for name in (ACTOR, CRITIC))
