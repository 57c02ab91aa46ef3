"""Reward shaping, generalised advantages, returns and whitening moments in one pass over the action stream."""

from __future__ import annotations

from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from .. import validate
from ..common.streams import may_be_nonzero
from ..dispatch import select
from ..types import ShapedGAE
from .inputs import GAECoefficients, GAEInputs
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
    lam: float | Tensor = 0.95,
    lam_value: float | Tensor | None = None,
    unit: Literal["token", "turn"] = "token",
    bootstrap_N: Tensor | None = None,
    mask_A: Tensor | None = None,
    token_reward_A: Tensor | None = None,
) -> ShapedGAE:
    """Return KL-shaped rewards, generalised advantages, returns, KL per response and moments of the advantages.

    Within each sequence, over its unmasked tokens t, with T the last of them and t+1 the next unmasked token:

        reward_t = -kl_coef * kl_t + token_reward_t + (score_n if t = T else 0)
        delta_t = reward_t + gamma * V_{t+1} - V_t
        advantage_t = delta_t + gamma * lam * advantage_{t+1}
        target_t = delta_t + gamma * lam_value * target_{t+1}
        return_t = target_t + V_t

    Beyond T, V_{T+1} is `bootstrap_N` of the sequence (0 without it), and advantage_{T+1} and target_{T+1} are 0.

    With unit="turn" the recursion runs over turns instead of tokens. A turn is a maximal run of unmasked entries: the
    tokens of a tool or an observation separate two of them. Its reward is the sum over its tokens, the KL per token
    included; its V is that at its first token. Each of its tokens gets the advantage of the turn, and counts in the
    moments. Its return is at the first token: `value_mask_A` is True there, and the value loss trains there only.

    Source: Schulman et al. 2016 (arXiv:1506.02438); the reward is that of Ziegler et al. 2019 (arXiv:1909.08593); two
    lambdas are those of VC-PPO (arXiv:2503.01491), one per sequence that of VAPO (arXiv:2504.05118); turns as in AReaL
    1600 on GitHub.

    Args:
        score_N: [N] floating, the total score of each sequence, from all sources; 0 if it has no unmasked action.
        value_A: [A] floating, values V.
        logprob_A: [A] floating, log-probs in nats under the policy that sampled.
        ref_logprob_A: [A] floating, log-probs under the reference. None only if kl_coef is 0.
        cu_actions: [N + 1] int32 or int64, from 0, non-decreasing, at most A. Entries beyond its last are slack.
        kl_coef: Number or 0-dim tensor, reward per nat.
        kl_estimator: "k1", "k2", "k3" or "abs" (see `kl_divergence`, also for a log-prob of -inf).
        gamma: Discount, in [0, 1].
        lam: The lambda of the advantages, in [0, 1]: a number, or [N] floating with one per sequence.
        lam_value: The lambda of the returns, as `lam`. None: that of the advantages, so return = advantage + V.
        unit: "token" or "turn", what a step of the recursion is.
        bootstrap_N: [N] floating, V beyond the last unmasked token; pass 0 for sequences that ended. None: 0.
        mask_A: [A], bool, integers, or floats of 0 and 1; 0 masks an entry. The recursion passes through masked entries
            unchanged, whatever they hold.
        token_reward_A: [A] floating, rewards by token.

    Returns:
        ShapedGAE in fp32 (fp64 if an input is), without gradient: `advantage_A`, `return_A`, `reward_A`, 0 at masked
        and slack entries; `kl_N`, the estimator summed over each response in nats, without the coefficient; `moments`
        of this rank's unmasked advantages (reduce them before whitening); `value_mask_A`, with unit="turn".

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong; on a CPU also for invalid boundaries, and for a nonzero score of
            a sequence without an unmasked action. On a device nothing is read back, because that would synchronise:
            boundaries and lambdas in tensors are not validated, and such a score makes kl_N of its response and the
            mean of the moments NaN.
    """
    op = "shaped_gae"
    on_cpu = getattr(score_N, "device", None) == CPU
    # 1. Streams: N entries, or A entries.
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
    # 2. Numbers.
    validate.check_number(op, "kl_coef", kl_coef, like=score_N)
    if ref_logprob_A is None and may_be_nonzero(kl_coef):
        raise ValueError(f"{op}: ref_logprob_A must be given when kl_coef is {kl_coef}, got None")
    validate.check_choice(op, "kl_estimator", kl_estimator, validate.KL_ESTIMATORS)
    validate.check_plain_number(op, "gamma", gamma, low=0.0, high=1.0)
    _check_lambda(op, "lam", lam, score_N)
    if lam_value is not None:
        _check_lambda(op, "lam_value", lam_value, score_N)
    validate.check_choice(op, "unit", unit, ("token", "turn"))
    if on_cpu:
        _check_boundaries(op, cu_actions, shape[0])
    inputs = GAEInputs(score_N, value_A, logprob_A, ref_logprob_A, cu_actions, bootstrap_N, mask_A, token_reward_A)
    lam = float(lam) if isinstance(lam, Real) else lam
    lam_value = float(lam_value) if isinstance(lam_value, Real) else lam_value
    coefficients = GAECoefficients(kl_coef, kl_estimator, float(gamma), lam, lam_value, unit == "turn")
    # 3. Run, then check the scores: only the result shows cheaply if one has no unmasked action.
    shaped = select(op, value_A, score_N, logprob_A, ref_logprob_A, token_reward_A)(inputs, coefficients)
    if on_cpu:
        _check_scores(op, shaped, inputs)
    return shaped


def _check_lambda(op: str, name: str, lam: float | Tensor, score_N: Tensor) -> None:
    if not isinstance(lam, Tensor):
        validate.check_plain_number(op, name, lam, low=0.0, high=1.0)
        return
    validate.check_floating(op, name, lam, tuple(score_N.shape), score_N)
    if lam.device == CPU:
        outside_N = ~((lam >= 0) & (lam <= 1))
        if outside_N.any():
            n = int(outside_N.nonzero()[0])
            raise ValueError(f"{op}: {name} must be finite, >= 0.0 and <= 1.0, got {float(lam[n])} at sequence {n}")


def _check_boundaries(op: str, cu_actions: Tensor, extent: int) -> None:
    bad = (cu_actions[0] != 0) | (cu_actions.diff() < 0).any() | (cu_actions[-1] > extent)
    if bad:
        raise ValueError(
            f"{op}: cu_actions must start at 0, never fall and end at or before {extent}, got "
            f"{cu_actions[:4].tolist()} ... {cu_actions[-2:].tolist()}"
        )


def _check_scores(op: str, shaped: ShapedGAE, inputs: GAEInputs) -> None:
    # Every backend marks a score without an action as NaN in kl_N. NaN log-probs do the same, hence the second look.
    if shaped.kl_N.isnan().any():
        unassigned_score_N = has_unassigned_score(inputs.score_N, inputs.cu_actions, inputs.mask_A)
        if unassigned_score_N.any():
            n = int(unassigned_score_N.nonzero()[0])
            raise ValueError(
                f"{op}: score_N must be 0 for a response without unmasked actions, got {float(inputs.score_N[n])} at "
                f"sequence {n}"
            )
