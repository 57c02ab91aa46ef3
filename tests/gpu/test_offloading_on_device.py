"""What is offloaded leaves a CUDA device without a wait, lies in pinned memory, and returns with its bits."""

import pytest
import torch

pytest.importorskip("megatron.core", reason="the engine needs megatron-core, and the kernels beside it do not")

from icegrt.config import OptimizerConfig
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_offloaded_run_has_the_bits_of_a_resident_one(dtype, tmp_path):
    weights = {}
    for choice in ("none", "all"):
        config = tiny.ppo_config(tmp_path / choice, iterations=2, run={"dtype": dtype}, offload={"roles": choice})
        reward = [tiny.scorer(1), tiny.count_letters]
        with PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, tiny.PROMPTS) as trainer:
            trainer.train()
            weights[choice] = {}
            for name, role in trainer.components.roles.items():
                with role.placement.hold(PARAMETERS):
                    weights[choice] |= {f"{name}.{n}": p for n, p in tiny.parameters(role).items()}
    assert tiny.same(weights["all"], weights["none"])
