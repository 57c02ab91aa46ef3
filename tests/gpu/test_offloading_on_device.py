"""What is offloaded leaves a CUDA device without a wait, lies in pinned memory, and returns with its bits."""

import pytest
import torch

pytest.importorskip("megatron.core", reason="the engine needs megatron-core, and the kernels beside it do not")

from icegrt.config import CriticConfig, OptimizerConfig
from icegrt.ppo.trainer import PPOTrainer
from icegrt.residency import KINDS, OPTIMIZER, PARAMETERS, HostMemory, Residency
from icegrt.roles.offload import place
from tests.helpers import tiny_models as tiny


def test_a_role_leaves_and_returns_without_a_wait(cluster):
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    role = tiny.role(tiny.causal_lm(0, **wide), learns=OptimizerConfig(), dtype=torch.bfloat16)
    weights = tiny.parameters(role)
    residency, host = Residency(), HostMemory(role.device)
    place(role, residency, host, KINDS)
    before = torch.cuda.memory_allocated()
    residency.move()
    released = before - torch.cuda.memory_allocated()
    sizes = sum(x.nbytes for x in weights.values())
    assert released > 4 * sizes  # bf16 weights, then gradients and master weights in fp32: five times the weights
    slots = [slot for part in residency._parts.values() for slot in part._slots.values()]
    assert all(slot.host.is_pinned() for slot in slots if slot.host is not None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with residency.hold("role", *KINDS):
            pass
        role.weight_changes += 1
        residency.move()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with residency.hold("role", PARAMETERS, OPTIMIZER):
        assert tiny.same(tiny.parameters(role), weights)


def weights_after(folder, dtype, optimizer=None, **offload):
    """Return the weights of all roles after a run of three iterations."""
    changes = {}
    if optimizer is not None:
        changes = {"optimizer": optimizer, "critic": CriticConfig(optimizer=optimizer)}
    config = tiny.ppo_config(folder, iterations=3, run={"dtype": dtype}, offload=offload, **changes)
    reward = [tiny.scorer(1), tiny.count_letters]
    with PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, tiny.PROMPTS) as trainer:
        trainer.train()
        weights = {}
        for name, role in trainer.components.roles.items():
            with role.placement.hold(PARAMETERS):
                weights |= {f"{name}.{n}": p for n, p in tiny.parameters(role).items()}
        return weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_offloaded_run_has_the_bits_of_a_resident_one(dtype, tmp_path):
    resident = weights_after(tmp_path / "none", dtype)
    assert tiny.same(weights_after(tmp_path / "all", dtype, roles="all"), resident)
    early = {"roles": "all", "prefetch": True, "reference": "layers", "reward": "layers"}
    assert tiny.same(weights_after(tmp_path / "early", dtype, **early), resident)


def test_adam_on_the_host_takes_the_steps_of_the_device_up_to_rounding(cluster):
    weights = []
    for on_host in (False, True):
        role = tiny.role(tiny.causal_lm(0), learns=OptimizerConfig(lr=1e-2, clip_grad=0.5, on_host=on_host))
        generator = torch.Generator().manual_seed(7)
        for _ in range(3):
            role.zero_gradients()
            for parameter in role.model.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            role.optimizer.step()
        weights.append(tiny.parameters(role))
    for name, weight in weights[1].items():
        torch.testing.assert_close(weight, weights[0][name], rtol=1e-5, atol=1e-6)
