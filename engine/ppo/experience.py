"""The experience of one iteration: a batch plan, what the roles computed on it, and the advantages.

Scoring and update use the same plan. Both read log-probs with one routine, over the same rows in the same chunks
(`linear_logprobs` and `linear_ppo_loss` share their forward). Before the first step the ratio is exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.kernels import Moments, ShapedGAE, shaped_gae
from icegrt.packing.transfer import copy_to_device
from icegrt.ppo.advantages import ESTIMATORS, compare_sequences
from icegrt.ppo.advantages.lambdas import recursion_keywords
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.loss_weights import LossWeights
from icegrt.ppo.scores import Scores


@dataclass(frozen=True)
class Experience:
    """This rank's responses of an iteration with everything that the update reads.

    Attributes:
        plan: micro-batches, with the actions of dropped responses masked.
        scores: per response.
        old_logprob_A, entropy_A, ref_logprob_A, value_A: [A] float32 over this rank's action stream, on the device.
            Without an inference pass of the actor the old log-probs are the rollout's, and entropy_A is None; without a
            critic value_A is None.
        shaped: advantages, returns and rewards per token, KL per response, and the moments of this rank's advantages,
            on the device.
        moments: moments of the advantages over all ranks.
        rollout_logprob_A: log-probs that the rollout recorded, [A] float32 on the device; None: not needed.
        weights: factors of the policy loss by token.
        own_returns: whether a return may be something else than the advantage plus the value of the same token.
    """

    plan: BatchPlan
    scores: Scores
    old_logprob_A: Tensor
    entropy_A: Tensor | None
    ref_logprob_A: Tensor
    value_A: Tensor | None
    shaped: ShapedGAE
    moments: Moments
    rollout_logprob_A: Tensor | None = None
    weights: LossWeights = field(default_factory=LossWeights)
    own_returns: bool = False

    def whitening_moments(self, config: PPOConfig) -> Moments | None:
        """Return the moments by which the loss whitens, on the device; None: advantages stay as they are."""
        return {"global": self.moments, "rank": self.shaped.moments, "none": None}[config.whitening]


def compute_advantages(
    config: PPOConfig,
    kl_coef: float,
    plan: BatchPlan,
    scores: Scores,
    old_logprob_A: Tensor,
    ref_logprob_A: Tensor,
    value_A: Tensor | None,
    last_value_N: Tensor | None,
    token_reward_A: Tensor | None = None,
) -> ShapedGAE:
    """Return KL penalty, advantages, returns and this rank's moments, in one pass over the action stream.

    It runs on the device of the log-probs, where what comes from the host (scores, offsets, masks) is copied.
    Estimators that compare the responses to a prompt are a collective.

    Args:
        config: advantage, kl_in, kl_estimator, gamma, the lambdas, advantage_unit, group_std and
            bootstrap_truncated are read.
        kl_coef: of the KL penalty if `kl_in` is "reward".
        plan: [N] responses with [A] actions.
        scores: the total is paid at a response's last token.
        old_logprob_A: [A], of the policy that sampled, from inference or from the rollout.
        ref_logprob_A: [A], of the reference.
        value_A: [A], before every action; None: 0, without a critic.
        last_value_N: [N], after every response's last token; None likewise.
        token_reward_A: [A], added to the rewards; None: nothing.
    """
    host = {"total_N": scores.total_N, "cu_actions": plan.cu_actions, "truncated_N": plan.truncated_N}
    host |= {} if plan.mask_A is None else {"mask_A": plan.mask_A}
    host |= {} if token_reward_A is None else {"token_reward_A": token_reward_A}
    estimator = ESTIMATORS[config.advantage]
    gamma, lam = estimator.discount(config)
    recursion = recursion_keywords(config, plan) if config.has_critic else {"lam": lam}
    host |= {name: x for name, x in recursion.items() if isinstance(x, Tensor)}
    inputs = copy_to_device(host, old_logprob_A.device, non_blocking=True)
    bootstrap_N = None
    if config.bootstrap_truncated and last_value_N is not None:
        bootstrap_N = torch.where(inputs["truncated_N"], last_value_N, 0.0)
    shaped = shaped_gae(
        inputs["total_N"],
        torch.zeros_like(old_logprob_A) if value_A is None else value_A,
        old_logprob_A,
        ref_logprob_A,
        inputs["cu_actions"],
        kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        gamma=gamma,
        **{name: inputs.get(name, x) for name, x in recursion.items()},
        bootstrap_N=bootstrap_N,
        mask_A=inputs.get("mask_A"),
        token_reward_A=inputs.get("token_reward_A"),
    )
    if estimator.compare is None:
        return shaped
    return compare_sequences(config, kl_coef, plan, scores.total_N, token_reward_A, shaped, estimator.compare)
