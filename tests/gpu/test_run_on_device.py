"""An iteration on a CUDA device: every tensor where its kernel looks for it, scoring and update of one shape."""

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from icegrt.distributed.cluster import Cluster
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("whiten", [False, True])
def test_an_iteration_at_rest_has_a_ratio_of_exactly_one(whiten, dtype, tmp_path):
    still = tiny.OptimizerConfig(lr=0.0)
    changes = {"whiten_advantages": whiten, "optimizer": still, "critic": tiny.CriticConfig(optimizer=still)}
    config = tiny.ppo_config(tmp_path / "run", iterations=1, run={"dtype": dtype}, **changes)
    reward = [tiny.scorer(1), tiny.count_letters]
    with PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, tiny.PROMPTS) as run:
        assert next(run.actor.model.parameters()).is_cuda
        step = run.step()
    assert (step.ratio_min, step.ratio_max) == (1.0, 1.0) and step.grad_norm_actor > 0
    assert step.kl_nats_per_response == 0.0


def test_megatrons_generators_are_there_for_sequence_parallelism():
    with Cluster.open(), get_cuda_rng_tracker().fork():
        torch.rand(1, device="cuda")
