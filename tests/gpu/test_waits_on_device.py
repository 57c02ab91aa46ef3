"""The host waits for a CUDA device nowhere within inference and the update: torch raises where it would."""

import contextlib

import pytest
import torch

pytest.importorskip("megatron.core", reason="the engine needs megatron-core, and the kernels beside it do not")

from icegrt.config import OptimizerConfig, PPOConfig
from icegrt.packing import pack
from icegrt.ppo.batch_plan import ActionBatch
from icegrt.ppo.losses import CriticLoss, PolicyLoss
from icegrt.ppo.scoring import LogprobScorer, score_values
from icegrt.roles.micro_batch import MicroBatch
from tests.helpers import tiny_models as tiny

SCORER = LogprobScorer(1.0, 16)


@contextlib.contextmanager
def no_waits():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batches(masked):
    built = []
    for length in (9, 12, 10):
        masks = [[n % 3 > 0 for n in range(length)]] * 4 if masked else None
        batch = pack([[2] * 5] * 4, [[3] * length] * 4, action_masks=masks)
        zeros_A = torch.zeros(batch.n_actions)
        streams = ("old_logprob_A", "ref_logprob_A", "advantage_A", "old_value_A", "return_A")
        built.append(batch.extended(ActionBatch, **dict.fromkeys(streams, zeros_A)))
    return built


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_and_update_never_wait(cluster, dtype, masked):
    actor = tiny.role(tiny.causal_lm(0), learns=OptimizerConfig(), dtype=dtype)
    critic = tiny.role(tiny.scorer(1), "scalar", learns=OptimizerConfig(), dtype=dtype)
    micro_batches = batches(masked)
    policy = PolicyLoss(PPOConfig(), actor, 0.0, None, SCORER, may_clip=False)

    def passes():
        SCORER(actor, micro_batches, entropy=True)
        score_values(critic, micro_batches)
        for role, loss in ((actor, policy), (critic, CriticLoss(critic, 0.2))):
            role.zero_gradients()
            role.accumulate([MicroBatch(batch, loss) for batch in micro_batches])

    passes()  # compiles kernels, and allocates pinned memory
    with no_waits():
        passes()
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        torch.ones(1, device="cuda").item()
