"""The rehearsed device goes through the engine's code for GPUs: groups of NCCL alone, overlapped gathers, few waits."""

import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from icegrt.distributed.layout import Layout
from icegrt.errors import RunError
from icegrt.rehearsal.collectives import DeviceMismatch
from icegrt.rehearsal.device import _EXTENSION_OPERATORS, rehearsed_gpu, rehearsed_world
from icegrt.rehearsal.watcher import Watcher
from icegrt.roles import role
from icegrt.roles.optimizer import wrap
from tests.helpers.rehearsals import GIB, rehearse_rank, small_config, write_model

META = torch.device("meta")


def opened(layout, world_size=8, rank=0):
    """The cluster of a rank, its watcher, and the counts of a block."""
    watcher = Watcher()
    return watcher, rehearsed_gpu(watcher, 80 * GIB), rehearsed_world(layout, rank, world_size, 8)


def test_no_kernel_of_the_extension_gets_an_address_of_the_meta_device():
    """They would read address 0 in a rehearsal of ranks on CPUs. shaped_gae takes arrays, which meta tensors refuse."""
    sources = (Path(__file__).parents[2] / "src" / "icegrt" / "kernels").glob("*/cpp.py")
    called = {name for path in sources for name in re.findall(r"\b_C\.(\w+)\(", path.read_text(encoding="utf-8"))}
    assert called == set(_EXTENSION_OPERATORS)


def test_no_group_has_a_host_side(tmp_path):
    new_group = dist.new_group
    watcher, gpu, world = opened(Layout(tensor=2, pipeline=2))
    with gpu, world as cluster, watcher:
        groups = list(dist.distributed_c10d._world.pg_map)
        assert len(groups) > 10 and cluster.pipeline_return_group in groups
        assert cluster.pipeline_return_group.group_desc == "PIPELINE_RETURN_GROUP"
        for group in groups:
            assert {device.type for device in group._device_types} == {"meta"}
            with pytest.raises((DeviceMismatch, RuntimeError), match="host tensor"):
                dist.all_reduce(torch.ones(2), group=group)
        with pytest.raises(RunError, match=r"test_device\.py:\d+: a process group of gloo"):
            dist.new_group([0, 1], backend="gloo")
    assert dist.new_group is new_group
    # Optimizers open none either: it would be refused.
    config = small_config(write_model(tmp_path / "model"), "ppo.parallel.tensor=2", "ppo.parallel.pipeline=2")
    assert all(counts.transfers for counts in rehearse_rank(config, world_size=8).watcher.phases.values())


def test_planted_gloo_groups_are_refused(monkeypatch):
    from megatron.core import parallel_state

    initialize = parallel_state.initialize_model_parallel

    def with_gloo(*args, **kwargs):
        initialize(*args, **(kwargs | {"create_gloo_process_groups": True}))

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", with_gloo)
    _, gpu, world = opened(Layout())
    with gpu, pytest.raises(RunError, match=r"megatron/core/parallel_state\.py:\d+: a process group of gloo"), world:
        pass


@pytest.mark.parametrize("pipeline", [1, 2])
def test_parameters_are_gathered_in_the_order_of_their_use(tmp_path, monkeypatch, pipeline):
    # Small buckets, so that the projections of an attention are in buckets of their own.
    monkeypatch.setattr(role, "wrap", partial(wrap, bucket_size=4000))
    config = small_config(write_model(tmp_path / "model"), f"ppo.parallel.pipeline={pipeline}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The next bucket's parameter all-gather")
        rehearse_rank(config, world_size=4)


def test_the_host_waits_twice_for_results_of_all_ranks():
    watcher, gpu, world = opened(Layout(), world_size=16)
    with gpu, world as cluster, watcher, watcher.phase("block") as counts:
        parts = cluster.all_gather(torch.tensor([[3, 4], [5, 6]], device=META))
    assert [part.tolist() for part in parts] == [[[3, 4], [5, 6]]] * 16
    assert sum(counts.syncs.values()) == 2
