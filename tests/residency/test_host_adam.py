"""Adam on the host has the bits and the checkpoints of Adam on the device, and leaves nothing there."""

import gc

import pytest
import torch

from icegrt.checkpoint import megatron
from icegrt.config import OptimizerConfig
from icegrt.errors import RunError
from icegrt.residency import HostMemory
from icegrt.roles import host_adam
from icegrt.roles.optimizer import inner_optimizers
from tests.helpers import tiny_models as tiny
from tests.residency.test_offloaded_runs import make, on_host, rows, same, state, train

CHANGES = {"iterations": 3, "eval_every": 0, "offload": {"roles": "all"}}


def trained_role(steps=2, dtype=torch.float32, is_fused=False, **changes):
    """Return a role and its weights after some optimizer steps along random gradients that are clipped."""
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5, **changes)
    role = tiny.role(tiny.causal_lm(0), learns=config, dtype=dtype)
    for group in role.optimizer.param_groups if is_fused else ():
        group["fused"] = True
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        role.zero_gradients()
        for parameter in role.model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        role.optimizer.step()
    return role, tiny.parameters(role)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_that_resumes_on_the_host_and_back_has_the_bits_of_one_on_the_device(dtype, tmp_path):
    resident = train(tmp_path / "resident", iterations=3, eval_every=0, run={"dtype": dtype})
    for n, choice in enumerate((True, False, True)):
        run = {"dtype": dtype, "resume": n > 0}
        with make(tmp_path / "run", **CHANGES, **on_host(choice), run=run) as trainer:
            trainer.step()
            adams = [inner.optimizer for role in trainer.roles for inner in inner_optimizers(role.optimizer)]
            assert {isinstance(adam, host_adam.HostAdam) for adam in adams} == {choice}
            outcome = state(trainer), rows(tmp_path / "run")
    assert same(outcome, resident)


def live_tensors():
    """Return all tensors of this process."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_are_parameters_and_gradients_alone(dtype, cluster):
    earlier = live_tensors()  # of other tests; kept, so that no later storage has the identity of theirs
    role = trained_role(dtype=dtype, on_host=True)[0]
    (adam,) = (inner.optimizer for inner in inner_optimizers(role.optimizer))
    state = [x for master, entry in adam.state.items() for x in (master, master.grad, *entry.values())]
    state = [x for x in (*state, *(shard.host_grad for shard in adam.shards)) if x is not None and x.dim()]
    on_the_host = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in state}
    # Weight, gradient and two moments in fp32, in one block.
    assert sum(on_the_host.values()) == 16 * sum(parameter.numel() for parameter in role.model.parameters())
    assert sum(on_the_host.values()) <= adam.host.bytes < sum(on_the_host.values()) + 64 * len(on_the_host)
    tensors = [*role.model.parameters(), *(buffer.grad_data for ddp in role.ddps for buffer in ddp.buffers)]
    expected = {*on_the_host, *(x.untyped_storage()._cdata for x in (*tensors, *earlier))}
    sizes = {parameter.numel() for parameter in role.model.parameters()} - set(range(65))
    others = [x for x in live_tensors() if x.numel() in sizes]
    assert [x for x in others if x.untyped_storage()._cdata not in expected] == []


def test_the_fused_kernel_that_a_run_on_a_gpu_takes_has_the_same_steps(cluster):
    _, expected = trained_role(steps=3)
    _, weights = trained_role(steps=3, on_host=True, is_fused=True)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", [False, True])
def test_counts_of_steps_are_saved_where_transformer_engine_is_installed(choice, cluster, monkeypatch):
    from megatron.core.optimizer import distrib_optimizer

    role, _ = trained_role(steps=3, on_host=choice)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    document = megatron.sharded(role, loading=False)["optimizer"]
    assert {group["step"] for group in document["optimizer"]["param_groups"]} == {3}
    assert distrib_optimizer.HAVE_APEX_OR_TE


def test_too_little_host_memory_is_an_error_before_anything_has_moved(cluster, monkeypatch):
    def no_memory(host, sizes):
        raise RunError("offloading: no host memory")

    monkeypatch.setattr(HostMemory, "allocate_each", no_memory)
    with pytest.raises(RunError, match="no host memory"):
        trained_role(on_host=True)
