"""Reward shaping, generalised advantages, returns and whitening moments in one pass over the action stream."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import ShapedGAE
from .reference import has_unassigned_score

CPU = torch.device("cpu")


def shaped_gae(
    score_N: Tensor,
    value_A: Tensor,
    logprob_A: Tensor,
    ref_logprob_A: Tensor | None,
    cu_actions: Tensor,
    *,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_N: Tensor | None = None,
    mask_A: Tensor | None = None,
    token_reward_A: Tensor | None = None,
) -> ShapedGAE:
    """reward_t = -kl_coef * kl_t + token_reward_t + [t last unmasked action] * score; delta_t = reward_t + gamma *
    V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}; return_t = A_t + V_t (Schulman et al. 2016).

    score_N: [N]; value_A, logprob_A, ref_logprob_A, token_reward_A: [A] floating; ref_logprob_A None only if kl_coef
    is 0. cu_actions: [N + 1] int, from 0, non-decreasing, at most A; entries beyond its last are slack and come back 0.
    bootstrap_N: [N], V after the last token (None: 0); pass 0 for sequences that ended. mask_A: [A], 0 where masked:
    such entries carry the recursion through unchanged, come back as 0 and count in no sum, whatever they hold.
    Returns ShapedGAE in fp32 (fp64 if an input is), without gradient; kl_N sums the estimator over each response,
    unscaled; moments are of the unmasked advantages of this rank (reduce them before whitening).
    Raises TypeError or ValueError naming the argument; a nonzero score with no unmasked action to land on is refused.
    On a device nothing is read back: there boundaries are the caller's word, and a score without an action turns kl_N
    of its response and the mean of the moments into NaN instead.
    """
    op = "shaped_gae"
    on_cpu = getattr(score_N, "device", None) == CPU
    validate.check_floating(op, "score_N", score_N, (None,))
    validate.check_integral(op, "cu_actions", cu_actions, (score_N.shape[0] + 1,), score_N)
    validate.check_floating(op, "value_A", value_A, (None,), score_N)
    shape = tuple(value_A.shape)
    validate.check_floating(op, "logprob_A", logprob_A, shape, score_N)
    for name, x in (("ref_logprob_A", ref_logprob_A), ("token_reward_A", token_reward_A)):
        if x is not None:
            validate.check_floating(op, name, x, shape, score_N)
    if bootstrap_N is not None:
        validate.check_floating(op, "bootstrap_N", bootstrap_N, tuple(score_N.shape), score_N)
    validate.check_mask(op, "mask_A", mask_A, shape, score_N)
    validate.check_number(op, "kl_coef", kl_coef, like=score_N)
    if ref_logprob_A is None and (isinstance(kl_coef, Tensor) or kl_coef != 0):
        raise ValueError(f"{op}: ref_logprob_A must be given when kl_coef is {kl_coef}, got None")
    validate.check_choice(op, "kl_estimator", kl_estimator, validate.KL_ESTIMATORS)
    validate.check_plain_number(op, "gamma", gamma, low=0.0, high=1.0)
    validate.check_plain_number(op, "lam", lam, low=0.0, high=1.0)
    if on_cpu:
        _check_boundaries(op, cu_actions, shape[0])
    shaped = select(op, value_A, score_N, logprob_A, ref_logprob_A, token_reward_A)(
        score_N,
        value_A,
        logprob_A,
        ref_logprob_A,
        cu_actions,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        gamma=float(gamma),
        lam=float(lam),
        bootstrap_N=bootstrap_N,
        mask_A=mask_A,
        token_reward_A=token_reward_A,
    )
    if on_cpu:
        _check_scores(op, shaped, score_N, cu_actions, mask_A)
    return shaped


def _check_boundaries(op: str, cu_actions: Tensor, extent: int) -> None:
    bad = (cu_actions[0] != 0) | (cu_actions.diff() < 0).any() | (cu_actions[-1] > extent)
    if bad:
        raise ValueError(
            f"{op}: cu_actions must start at 0, never fall and end at or before {extent}, got "
            f"{cu_actions[:4].tolist()} ... {cu_actions[-2:].tolist()}"
        )


def _check_scores(op: str, shaped: ShapedGAE, score_N: Tensor, cu_actions: Tensor, mask_A: Tensor | None) -> None:
    # Every backend marks a score without an action as NaN in kl_N; so do NaN log-probs, hence the second look.
    if shaped.kl_N.isnan().any():
        unassigned_score_N = has_unassigned_score(score_N, cu_actions, mask_A)
        if unassigned_score_N.any():
            n = int(unassigned_score_N.nonzero()[0])
            raise ValueError(
                f"{op}: score_N must be 0 for a response without unmasked actions, got {float(score_N[n])} at "
                f"sequence {n}"
            )
