"""The search finds the mildest changes that fit, among rehearsed candidates alone."""

import pytest

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.planning.changes import AXES, Change, Cluster, apply, changes_of
from icegrt.planning.footprint import MemoryPeak, PhaseMemory, RankMemory
from icegrt.planning.search import Search
from tests.helpers.rehearsals import small_config, write_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(write_model(tmp_path_factory.mktemp("search") / "model"), "ppo.token_budget=1024")


def search(config, peak, usable, gpus=8):
    """A search in which the peak is a function of the configuration, and the rehearsed configurations."""
    seen = []

    def rehearse(candidate):
        seen.append(candidate)
        nothing = MemoryPeak(0, {})
        return [RankMemory("every rank", 0, {"update": PhaseMemory(MemoryPeak(peak(candidate), {}), nothing)})]

    return Search(config, Cluster(gpus, 8, 200), rehearse, usable, AXES, lambda text: None), seen


def keys(candidate):
    return {name: value for change in candidate.changes for name, value in change.keys}


def test_the_changes_of_an_axis_go_from_the_mildest_to_the_strongest(config):
    changes = {axis: [dict(c.keys) for c in found] for axis, found in changes_of(config, Cluster(16, 8, 200)).items()}
    assert changes == {
        "token budget": [{"token_budget": 512}, {"token_budget": 256}],  # not below the longest sequence
        "recompute": [{"run.recompute": "selective"}, {"run.recompute": "full"}],
        "residency": [{"offload.roles": "optimizer"}, {"offload.roles": "all"}],
        "sharing": [{"sharing": "lora", "critic.init": "actor"}],
        # The model has 4 key/value heads and 4 layers.
        "tensor": [{"parallel.tensor": n, "parallel.sequence_parallel": True} for n in (2, 4)],
        "pipeline": [{"parallel.pipeline": n} for n in (2, 4)],
    }
    cache = apply(config, [Change("", (("rollout.kv_memory", "20GiB"),))])
    assert "KV cache" in changes_of(cache, Cluster(16, 8, 200))


def test_changes_set_keys_and_bad_values_are_refused(config):
    changed = apply(config, [Change("", (("parallel.tensor", 2), ("offload.roles", "all")))])
    assert (changed.parallel.tensor, changed.offload.roles, config.parallel.tensor) == (2, "all", 1)
    with pytest.raises(ConfigError, match="recompute"):
        apply(config, [Change("", (("run.recompute", "some"),))])


def test_a_configuration_that_fits_is_not_changed(config):
    found, seen = search(config, lambda c: 10, 10)
    assert [keys(c) for c in found.run()] == [{}] and len(seen) == 1


def test_each_kind_that_suffices_alone_is_proposed_at_its_mildest_level(config):
    def peak(c):
        return 100 // c.parallel.tensor - {"none": 0, "optimizer": 30, "all": 60}[c.offload.roles]

    found, seen = search(config, peak, 70)
    proposals = [keys(c) for c in found.run()]
    assert proposals == [{"offload.roles": "optimizer"}, {"parallel.tensor": 2, "parallel.sequence_parallel": True}]
    assert len(seen) == found.rehearsed == len({str(c) for c in seen})  # none is rehearsed twice


def test_kinds_are_combined_if_none_suffices_alone_and_made_as_mild_as_possible(config):
    def peak(c):
        offloaded = {"none": 0, "optimizer": 30, "all": 40}[c.offload.roles]
        recomputed = {"none": 0, "selective": 0, "full": 8}[c.run.recompute]
        return 100 - offloaded - recomputed - 25 * (c.parallel.tensor // 2)

    # Four tensor-parallel ranks leave the smallest peak. Beside them complete recomputation suffices; beside
    # offloading two ranks do.
    tensor = {size: {"parallel.tensor": size, "parallel.sequence_parallel": True} for size in (2, 4)}
    assert [keys(c) for c in search(config, peak, 45)[0].run()] == [
        {"run.recompute": "full", **tensor[4]},
        {"offload.roles": "optimizer", **tensor[2]},
    ]


def test_refused_candidates_are_left_out_and_no_fit_is_no_proposal(config):
    def peak(c):
        if c.parallel.tensor > 1:
            raise ConfigError("refused")
        return 100

    assert search(config, peak, 50)[0].run() == []


def test_a_refused_configuration_is_an_error(config):
    def peak(c):
        raise ConfigError("refused")

    with pytest.raises(ConfigError, match="refused"):
        search(config, peak, 50)


def test_the_default_configuration_has_all_axes():
    assert set(AXES) == {"KV cache", "token budget", "recompute", "residency", "sharing", "tensor", "pipeline"}
    assert PPOConfig().rollout.kv_memory == 0.9
