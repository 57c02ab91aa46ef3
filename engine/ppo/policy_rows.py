"""The responses that the actor's pass reads: those whose advantages are all 0 leave it, and count in its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.kernels import whiten
from icegrt.packing import PackedBatch, balance, pack
from icegrt.packing.transfer import copy_to_device
from icegrt.ppo.batch_plan import BatchPlan, group_by_prompt, split_group
from icegrt.ppo.experience import Experience
from icegrt.rollout.types import Response


@dataclass(frozen=True)
class PolicyRows:
    """The experience of the responses that the actor reads, and what left.

    Attributes:
        experience: of this rank's remaining responses, in micro-batches of their own; as many minibatches as before.
        left_actions: counted actions that left, by micro-batch: the first of a minibatch has those of all of it.
        left_responses: responses of this rank that left.
    """

    experience: Experience
    left_actions: Sequence[int] = ()
    left_responses: int = 0


def rows_can_leave(config: PPOConfig, kl_coef: float) -> bool:
    """Return whether `skip_zero_advantage` lets responses leave, and one without advantage adds nothing to the loss."""
    allowed = not config.has_critic if config.skip_zero_advantage == "auto" else config.skip_zero_advantage
    return allowed and not keys_that_need_all_rows(config, kl_coef)


def keys_that_need_all_rows(config: PPOConfig, kl_coef: float) -> list[str]:
    """Return the keys whose terms of the actor's loss also read responses without advantage.

    A KL term and an entropy bonus have a gradient at every token, and a right response may have no advantage.
    """
    terms = {
        "ppo.kl_in=loss": config.kl_in == "loss" and kl_coef,
        "ppo.entropy_coef": config.entropy_coef,
        "ppo.positive_nll_coef": config.positive_nll_coef,
    }
    return [key for key, coefficient in terms.items() if coefficient]


def policy_rows(config: PPOConfig, experience: Experience, kl_coef: float, cluster: Cluster) -> PolicyRows:
    """Return what the actor's pass reads. Collective.

    With a ratio of any size the surrogate of a zero advantage is 0, and so is its gradient: loss and gradients are
    those of the pass with all responses, up to the rounding of other micro-batches. Every rank has equally many
    micro-batches, one at least for each minibatch.

    Args:
        config: of the run.
        experience: this rank's responses.
        kl_coef: of the KL in the loss.
        cluster: the ranks.
    """
    if not rows_can_leave(config, kl_coef):
        return PolicyRows(experience)
    plan = experience.plan
    stays_N = _has_advantage(config, experience)
    if cluster.all_reduce_sum([int((~stays_N).sum())]) == [0.0]:
        return PolicyRows(experience)
    # 1. The responses of each minibatch by micro-batch, and as many micro-batches as the rank with the most.
    firsts = torch.tensor([0, *(b.n_sequences for b in plan.batches)]).cumsum(0).tolist()
    minibatches = [[n for i in step for n in range(firsts[i], firsts[i + 1])] for step in plan.minibatches]
    stays = stays_N.tolist()
    assigned = [
        _micro_batches(plan.local_responses, [n for n in members if stays[n]], config, cluster)
        for members in minibatches
    ]
    counts = torch.tensor([len(micro_batches) for micro_batches in assigned], device=cluster.device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=cluster.data_group)
    # 2. Their batches. The mask of a response moves with it.
    mask_A, starts = plan.mask_A, plan.cu_actions.tolist()
    local = plan.local_responses
    batches: list[PackedBatch] = []
    steps: list[list[int]] = []
    order: list[int] = []
    for micro_batches, count in zip(assigned, counts.tolist(), strict=True):
        padded = [*micro_batches, *([[]] * (count - len(micro_batches)))]
        steps.append(list(range(len(batches), len(batches) + count)))
        batches += [_packed(local, members, mask_A, starts, config, cluster) for members in padded]
        order += [n for members in micro_batches for n in members]
    # 3. What left still counts in the mean over actions.
    spans = pairwise(starts)
    counted = [end - start if mask_A is None else int(mask_A[start:end].sum()) for start, end in spans]
    left_actions = [0] * len(batches)
    for step, members in zip(steps, minibatches, strict=True):
        left_actions[step[0]] = sum(counted[n] for n in members if not stays[n])
    reduced = _reordered(experience, order, starts, batches, steps)
    return PolicyRows(reduced, left_actions, int((~stays_N).sum()))


def _has_advantage(config: PPOConfig, experience: Experience) -> Tensor:
    """Return which of this rank's responses have a counted action whose advantage the loss reads as other than 0."""
    plan, advantage_A = experience.plan, experience.shaped.advantage_A
    moments = experience.whitening_moments(config)
    if moments is not None:
        advantage_A = whiten(advantage_A, moments.to(advantage_A.device))
    lengths_N = plan.cu_actions.diff().long()
    host = {"lengths_N": lengths_N} | ({} if plan.mask_A is None else {"mask_A": plan.mask_A})
    inputs = copy_to_device(host, advantage_A.device, non_blocking=True)
    counts_A = (advantage_A != 0) & inputs.get("mask_A", torch.ones((), dtype=torch.bool, device=advantage_A.device))
    response_N = torch.arange(lengths_N.numel(), device=advantage_A.device)
    response_A = response_N.repeat_interleave(inputs["lengths_N"], output_size=advantage_A.numel())
    has_N = torch.zeros(lengths_N.numel(), dtype=torch.int32, device=advantage_A.device)
    found: Tensor = fetch(has_N.scatter_reduce(0, response_A, counts_A.int(), "amax"))
    return found > 0


def _micro_batches(
    local: Sequence[Response], members: list[int], config: PPOConfig, cluster: Cluster
) -> list[list[int]]:
    """Return members of a minibatch, numbers of this rank's responses, by micro-batch."""
    responses = [local[n] for n in members]
    groups = group_by_prompt(responses) if config.minibatch_by == "prompt" else [[i] for i in range(len(responses))]
    units = [unit for group in groups for unit in split_group(group, responses, config.token_budget)]
    sizes = [_n_tokens(unit, responses) for unit in units]
    (assignment,) = balance(sizes, token_budget=config.token_budget, round_to=cluster.share.round_to).assignments
    return [[members[i] for unit in micro_batch for i in units[unit]] for micro_batch in assignment]


def _n_tokens(unit: list[int], responses: Sequence[Response]) -> int:
    return len(responses[unit[0]].prompt) + sum(len(responses[i].tokens) for i in unit)


def _packed(
    local: Sequence[Response],
    members: list[int],
    mask_A: Tensor | None,
    starts: list[int],
    config: PPOConfig,
    cluster: Cluster,
) -> PackedBatch:
    responses = [local[n] for n in members]
    batch = pack(
        [r.prompt for r in responses],
        [r.tokens for r in responses],
        tail_multiple=cluster.share.tail_multiple,
        share_prompts=config.minibatch_by == "prompt",
    )
    if mask_A is None or not members:
        return batch
    return replace(batch, action_mask_A=torch.cat([mask_A[starts[n] : starts[n + 1]] for n in members]))


def _reordered(
    experience: Experience, order: list[int], starts: list[int], batches: list[PackedBatch], steps: list[list[int]]
) -> Experience:
    """Return the experience of the responses `order` with what the actor's loss reads in their order."""
    plan, shaped = experience.plan, experience.shaped
    local = plan.local_responses
    responses = [local[n] for n in order]
    parts = [torch.arange(starts[n], starts[n + 1]) for n in order]
    index_A = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
    index_A = copy_to_device({"index": index_A}, shaped.advantage_A.device, non_blocking=True)["index"]

    def reordered(x_A: Tensor | None) -> Tensor | None:
        return None if x_A is None else x_A[index_A]

    weights = experience.weights
    return replace(
        experience,
        plan=BatchPlan(responses, [list(range(len(order)))], 0, batches, steps),
        old_logprob_A=experience.old_logprob_A[index_A],
        ref_logprob_A=experience.ref_logprob_A[index_A],
        shaped=replace(shaped, advantage_A=shaped.advantage_A[index_A]),
        rollout_logprob_A=reordered(experience.rollout_logprob_A),
        weights=replace(weights, weight_A=reordered(weights.weight_A)),
    )
