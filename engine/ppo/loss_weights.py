"""What each token's loss is multiplied by: the aggregation of the policy loss, and the rollout's correction.

Megatron divides the summed loss of an optimizer step by C, the counted actions of its minibatch over all ranks. So a
mean of another kind is a weight by token. With S the responses of the minibatch that have a counted action, and L the
counted actions of the token's response:

    token      sum / C                                       weight 1
    sequence   mean over responses of their token means      weight C / (S L)
    constant   mean over responses of sum / loss_constant    weight C / (S loss_constant)

Sources: token, DAPO (arXiv:2503.14476); sequence, GRPO (arXiv:2402.03300); constant, Dr. GRPO (arXiv:2503.20783). C and
S are sums over all ranks, so K micro-batches have the gradient of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.corrections import behaviour_ratio, counted_per_sequence, truncated_weight


@dataclass(frozen=True)
class PositiveRows:
    """The counted actions of a micro-batch that belong to right responses.

    Attributes:
        index_P: int64, entries of the micro-batch's action stream, on the host.
        scale: factor of the sum of their -log p: C / (right responses' counted actions of the minibatch).
    """

    index_P: Tensor
    scale: float


@dataclass(frozen=True)
class LossWeights:
    """Factors of the policy loss of an iteration.

    Attributes:
        weight_A: factor of each token's loss, [A] float32 on the device; None: all 1.
        correction: none, tis or dis, for the metrics.
        ratio_A: pi_old / pi_rollout, [A] on the device, under `tis`; else None.
        truncated_A: the same, at most the cap.
        positive: the rows of the positive-example loss by micro-batch; None without that loss.
    """

    weight_A: Tensor | None = None
    correction: str = "none"
    ratio_A: Tensor | None = None
    truncated_A: Tensor | None = None
    positive: list[PositiveRows] | None = None


def right_responses(config: PPOConfig, function_N: Tensor | None, total_N: Tensor) -> Tensor | None:
    """Return which responses the positive-example loss is about, [N] bool; None without that loss.

    Args:
        config: `positive_nll_*` are read.
        function_N: task scores, NaN where a response has none; None without a function.
        total_N: total scores.
    """
    if not config.positive_nll_coef:
        return None
    score_N = total_N if config.positive_nll_score == "total" else function_N
    assert score_N is not None, "check_positive_nll"
    return score_N >= config.positive_nll_threshold


def loss_weights(
    config: PPOConfig,
    plan: BatchPlan,
    old_logprob_A: Tensor,
    rollout_logprob_A: Tensor | None,
    positive_N: Tensor | None,
    cluster: Cluster,
) -> LossWeights:
    """Return the factors of this rank's tokens. Collective, unless loss and correction are the defaults.

    Args:
        config: the keys of correction, aggregation and positive-example loss.
        plan: this rank's responses, with dropped ones masked.
        old_logprob_A: [A], of the actor before the update, on the device.
        rollout_logprob_A: [A], of the rollout, on the device; read by `tis` alone.
        positive_N: [N] bool, which responses were right; None: not asked for.
        cluster: the ranks.
    """
    ratio_A = truncated_A = weight_A = positive = None
    if config.correction == "tis":
        assert rollout_logprob_A is not None
        ratio_A = behaviour_ratio(config, plan, old_logprob_A, rollout_logprob_A)
        weight_A = truncated_A = truncated_weight(config, ratio_A)
    if config.loss_aggregation != "token" or positive_N is not None:
        aggregation_A, positive = _by_minibatch(config, plan, positive_N, cluster)
        if aggregation_A is not None:
            aggregation_A = aggregation_A.to(old_logprob_A.device)
            weight_A = aggregation_A if weight_A is None else weight_A * aggregation_A
    return LossWeights(weight_A, config.correction, ratio_A, truncated_A, positive)


def _by_minibatch(
    config: PPOConfig, plan: BatchPlan, positive_N: Tensor | None, cluster: Cluster
) -> tuple[Tensor | None, list[PositiveRows] | None]:
    """Return the weights of the aggregation, [A] on the host, and the rows of right responses by micro-batch."""
    # 1. Per micro-batch: counted actions of each response, and of the right ones.
    counts = counted_per_sequence(plan.batches)
    is_positive = [torch.zeros_like(c, dtype=torch.bool) for c in counts]
    if positive_N is not None:
        is_positive = list(positive_N.split([len(c) for c in counts]))
    # 2. Per minibatch, over all ranks: C, S, and the counted actions of right responses.
    local = []
    for members in plan.minibatches:
        local += [
            sum(int(counts[i].sum()) for i in members),
            sum(int((counts[i] > 0).sum()) for i in members),
            sum(int(counts[i][is_positive[i]].sum()) for i in members),
        ]
    totals = cluster.all_reduce_sum(local)
    # 3. Weights and rows of this rank.
    weights: list[Tensor] = [torch.empty(0)] * len(counts)
    rows: list[PositiveRows] = [PositiveRows(torch.empty(0, dtype=torch.int64), 0.0)] * len(counts)
    for number, members in enumerate(plan.minibatches):
        actions, sequences, positives = totals[3 * number : 3 * number + 3]
        for i in members:
            lengths = torch.tensor(plan.batches[i].response_lengths, dtype=torch.int64)
            divisor = torch.full_like(counts[i], config.loss_constant or config.sampling.max_new_tokens)
            if config.loss_aggregation == "sequence":
                divisor = counts[i].clamp(min=1)
            weight_N = actions / max(sequences, 1) / divisor.double()
            weights[i] = weight_N.repeat_interleave(lengths).float()
            counted_A = is_positive[i].repeat_interleave(lengths)
            if plan.batches[i].action_mask_A is not None:
                counted_A = counted_A & plan.batches[i].action_mask_A
            rows[i] = PositiveRows(counted_A.nonzero().squeeze(1), actions / max(positives, 1))
    aggregates = config.loss_aggregation != "token"
    return torch.cat(weights) if aggregates else None, None if positive_N is None else rows
