"""Every rank saves and loads its own shard of the optimizer, and any number of ranks reads what another has written."""

from functools import partial

import pytest
import torch

from icegrt.checkpoint import manager, megatron
from icegrt.checkpoint.manager import Checkpoints
from icegrt.checkpoint.optimizer_shards import boxes
from icegrt.config import OptimizerConfig
from icegrt.distributed.cluster import Cluster
from icegrt.roles import role as roles
from icegrt.roles.optimizer import inner_optimizers, wrap
from tests.helpers import tiny_models as tiny
from tests.helpers.ranks import launch

STATES = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4), (4, 1), (2, 3, 4)])
def test_boxes_have_the_entries_of_a_range_in_order(shape):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(numbers.numel()):
        for stop in range(start + 1, numbers.numel() + 1):
            some = list(boxes(shape, start, stop))
            entries = [numbers[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in some]
            assert torch.cat(entries).tolist() == list(range(start, stop))
            assert len(some) <= 2 * len(shape) - 1


def make_role(dtype, on_host):
    # Several buckets, as overlapped reductions have them; their ends are padded.
    roles.wrap = partial(wrap, overlap=True, bucket_size=2000)
    return tiny.role(tiny.causal_lm(0), learns=OptimizerConfig(lr=1e-2, on_host=on_host), dtype=dtype)


def states_of(role):
    """Return copies of this rank's weights, master weights, moments and counts of steps."""
    tensors = tiny.parameters(role)
    for inner in inner_optimizers(role.optimizer):
        mains = [main for group in inner.optimizer.param_groups for main in group["params"]]
        for n, main in enumerate(mains):
            state = inner.optimizer.state[main]
            tensors |= {f"{n}.{name}": state[name].clone() for name in (*STATES, "step")} | {f"{n}.main": main.clone()}
    return tensors


def randomize(role):
    """Give the optimizer states of all ranks random entries."""
    megatron.init_optimizer_states(role)
    generator = torch.Generator().manual_seed(11 + torch.distributed.get_rank())
    for inner in inner_optimizers(role.optimizer):
        for main in (main for group in inner.optimizer.param_groups for main in group["params"]):
            state = inner.optimizer.state[main]
            state["step"].fill_(3)
            for x in (main, *(state[name] for name in STATES)):
                x.detach().copy_(torch.rand(x.shape, generator=generator))


def save(cluster, role, folder, step):
    """Save a checkpoint. Returns the bytes of optimizer states that this rank writes."""
    sizes = []
    plan_save = megatron.plan_save

    def planned(role, folder):
        plan = plan_save(role, folder)
        tensors = [pair for _, _, (_, tensors) in plan.writer.write_buckets for pair in tensors]
        sizes.append(sum(x.nbytes for item, x in tensors if item.index.fqn.startswith("optimizer.")))
        return plan

    manager.megatron.plan_save = planned
    Checkpoints(cluster, folder, 9, background=False).save(step, [role], {})
    return sizes[0]


def local_elements(role):
    groups = [group for inner in inner_optimizers(role.optimizer) for group in inner.optimizer.param_groups]
    return sum(main.numel() for group in groups for main in group["params"])


def save_on_ranks(folder, dtype, on_host):
    with Cluster.open() as cluster:
        role = make_role(dtype, on_host)
        randomize(role)
        size = save(cluster, role, folder, 1)
        assert size == 12 * local_elements(role)  # this rank's shard and no more
        torch.save(states_of(role), folder / f"rank{cluster.rank}.pt")


def load_on_ranks(folder, dtype, on_host):
    with Cluster.open() as cluster:
        role = make_role(dtype, on_host)
        Checkpoints(cluster, folder, 9, background=False).load(folder / "checkpoints" / "step_000002", [role])
        assert tiny.same(states_of(role), torch.load(folder / f"rank{cluster.rank}.pt"))


def through_one_rank(folder, dtype, on_host):
    with Cluster.open() as cluster:
        role = make_role(dtype, not on_host)
        Checkpoints(cluster, folder, 9, background=False).load(folder / "checkpoints" / "step_000001", [role])
        size = save(cluster, role, folder, 2)
        elements = sum(parameter.numel() for parameter in role.model.parameters())
        assert size == 12 * elements == 12 * local_elements(role)


@pytest.mark.parametrize(("dtype", "on_host"), [(torch.float32, False), (torch.bfloat16, True)])
def test_two_ranks_save_half_each_and_one_rank_reads_and_writes_it_for_them(dtype, on_host, tmp_path):
    launch(2, save_on_ranks, tmp_path, dtype, on_host)
    launch(1, through_one_rank, tmp_path, dtype, on_host)
    launch(2, load_on_ranks, tmp_path, dtype, on_host)
