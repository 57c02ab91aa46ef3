"""Opening and closing: what a closed run leaves behind, which is nothing that runs."""

import contextlib
import gc
import sys
from pathlib import Path

import pytest
import torch

from icegrt.distributed import cluster
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import ConfigError
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.ranks import launch


def group_threads():
    """Threads of this process that serve a process group."""
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            names.append((thread / "comm").read_text())
    return sum("gloo" in name for name in names)


def opened_and_closed(folder, layout, most):
    """A group is two threads, and one of them wakes a hundred times a second."""
    for turn in range(3):
        with Cluster.open(layout):
            if layout == Layout():
                config = tiny.ppo_config(folder / f"run_{turn}", iterations=1)
                reward = [tiny.scorer(1), tiny.count_letters]
                with PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, tiny.PROMPTS) as run:
                    run.step()
                del run
            assert group_threads() <= most
        gc.collect()
        assert group_threads() == 0, f"after {turn + 1} openings"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted under /proc")
@pytest.mark.parametrize(("ranks", "layout", "groups"), [(1, Layout(), 2), (2, Layout(tensor=2), 3)])
def test_a_closed_cluster_leaves_no_thread_behind(ranks, layout, groups, tmp_path):
    launch(ranks, opened_and_closed, tmp_path, layout, 2 * groups)


def test_a_rank_may_take_as_long_in_every_group():
    # Megatron's own groups would give up after half an hour of rank 0's writing or of a slow reward function.
    with Cluster.open() as opened:
        groups = [opened.data_group, opened.model_group, torch.distributed.group.WORLD]
        # torch has no public reader of a group's timeout.
        patience = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    assert patience == {cluster.GLOO_TIMEOUT}


@pytest.mark.parametrize("interface", ["", "lo" if sys.platform == "linux" else "lo0"])
def test_a_group_has_one_worker(interface, monkeypatch):
    # Two workers of a group would free the name of its last collective twice.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    of_torch = torch.distributed.ProcessGroupGloo.__init__
    with Cluster.open() as opened:
        groups = [opened.data_group, opened.model_group, torch.distributed.group.WORLD]
        options = [group._get_backend(torch.device("cpu")).options for group in groups]
        assert [each._threads for each in options] == [1, 1, 1]
        assert opened.all_reduce_sum([2.5]) == [2.5]
    assert torch.distributed.ProcessGroupGloo.__init__ is of_torch


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert cluster.local_device() == torch.device("cuda", int(local_rank))
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"started 4 ranks on this machine, which shows 2 GPUs: .*--nproc-per-node 2"):
        cluster.local_device()


def parts_of_ranks():
    with Cluster.open() as opened:
        rank = opened.rank
        for sizes, width in (((3, 0, 5), ()), ((0, 0, 0), (2,)), ((1, 2, 1), (2, 3))):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool):
                generator = torch.Generator().manual_seed(1)
                parts = [(torch.randn(n, *width, generator=generator) * 9).to(dtype) for n in sizes]
                gathered = opened.all_gather(parts[rank])
                assert all(torch.equal(x, y) and x.dtype == dtype for x, y in zip(gathered, parts, strict=True))


def test_gathered_parts_are_those_of_the_ranks():
    launch(3, parts_of_ranks)
