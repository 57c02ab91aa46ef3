"""One advantage per response, from the rewards of the responses to its prompt on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.distributed.pipeline import fetch
from icegrt.kernels import ShapedGAE, masked_moments
from icegrt.packing.transfer import copy_to_device
from icegrt.ppo.advantages.groups import Groups
from icegrt.ppo.batch_plan import BatchPlan


def compare_sequences(
    config: PPOConfig,
    kl_coef: float,
    plan: BatchPlan,
    total_N: Tensor,
    token_reward_A: Tensor | None,
    shaped: ShapedGAE,
    compare: Callable[[Groups, PPOConfig], Tensor],
) -> ShapedGAE:
    """Return `shaped` with one advantage for all tokens of a response, and its moments. Collective.

        r = total score + sum of its token rewards - kl_coef * KL of the response

    The last term is there with `kl_in` "reward". Responses whose tokens are all masked, as those that were dropped,
    take no part, and their advantage is 0. A group is what was sampled from one drawn prompt: two rows of data with
    equal tokens may be scored differently.

    Args:
        config: kl_in is read, and what `compare` reads.
        kl_coef: of the KL penalty.
        plan: this rank's [N] responses with [A] actions.
        total_N: total scores.
        token_reward_A: by token; None: nothing.
        shaped: of the same responses; its KL is read, and its rewards and returns are kept.
        compare: see `Estimator`.
    """
    mask_A, lengths_N = plan.mask_A, plan.cu_actions.diff().long()
    if mask_A is None:
        mask_A = torch.ones(int(lengths_N.sum()), dtype=torch.bool)
    # 1. Rewards of this rank, in float64.
    reward_N = total_N.double()
    if token_reward_A is not None:
        reward_N = reward_N + _sum_by_response(torch.where(mask_A, token_reward_A, 0.0), lengths_N)
    if config.kl_in == "reward" and kl_coef:
        reward_N = reward_N - kl_coef * fetch(shaped.kl_N).double()
    counts_N = _sum_by_response(mask_A, lengths_N) > 0
    # 2. Those of all ranks: the responses to a prompt may be on several.
    reward_M, counts_M = plan.all_reduce_sequences(torch.where(counts_N, reward_N, 0.0), counts_N.double())
    group_M = torch.tensor([r.prompt_index for r in plan.responses], dtype=torch.int64)
    groups = Groups(reward_M, group_M, counts_M > 0, n_groups=int(group_M.max()) + 1 if len(group_M) else 0)
    advantage_N = plan.local_sequences(compare(groups, config))
    # 3. Tokens, on the device.
    host = {"advantage_N": advantage_N.float(), "lengths_N": lengths_N, "mask_A": mask_A}
    inputs = copy_to_device(host, shaped.advantage_A.device, non_blocking=True)
    advantage_A = inputs["advantage_N"].repeat_interleave(inputs["lengths_N"], output_size=mask_A.numel())
    advantage_A = torch.where(inputs["mask_A"], advantage_A, 0.0)
    return replace(shaped, advantage_A=advantage_A, moments=masked_moments(advantage_A, inputs["mask_A"]))


def _sum_by_response(x_A: Tensor, lengths_N: Tensor) -> Tensor:
    response_A = torch.arange(lengths_N.numel()).repeat_interleave(lengths_N)
    return torch.zeros(lengths_N.numel(), dtype=torch.float64).index_add(0, response_A, x_A.double())
