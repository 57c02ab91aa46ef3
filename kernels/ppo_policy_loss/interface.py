"""The clipped surrogate of PPO on log-probs, with dual clip, KL and entropy terms."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..common.streams import may_be_nonzero
from ..dispatch import select
from ..stats import Moments
from ..types import PPOLoss
from .inputs import PolicyObjective, PolicyStreams, check_policy_inputs


def ppo_policy_loss(
    logprob_A: Tensor,
    old_logprob_A: Tensor | None,
    advantage_A: Tensor,
    *,
    entropy_A: Tensor | None = None,
    ref_logprob_A: Tensor | None = None,
    mask_A: Tensor | None = None,
    weight_A: Tensor | None = None,
    normalizer: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k2",
    kl_gradient: str = "k2",
    entropy_coef: float | Tensor = 0.0,
    moments: Moments | None = None,
    shift_mean: bool = True,
    surrogate: str = "clip",
) -> PPOLoss:
    """Return the clipped policy loss of PPO, summed over unmasked tokens and divided by `normalizer`.

    With rho = exp(logprob - old_logprob) and advantage A:

        surrogate = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
        loss = sum weight * (surrogate + kl_coef * kl - entropy_coef * entropy) / normalizer

    Source: Schulman et al. 2017 (arXiv:1707.06347). With `dual_clip` c the surrogate is at most -A c if A < 0:
    Ye et al. 2020 (arXiv:1912.09729). The result is differentiable in logprob_A and entropy_A.

    With surrogate="mask" a token outside the bounds has no loss and no gradient, whatever the sign of its advantage:

        surrogate = -A rho    if 1 - clip_low <= rho <= 1 + clip_high, else 0

    Source: the double-sided importance sampling of SAO (arXiv:2607.07508), where old_logprob is that of the rollout.

    Args:
        logprob_A: [A] floating, log-probs in nats under the policy that is trained. -inf, as of a filtered token, has
            ratio 0 and no gradient.
        old_logprob_A: [A] floating, log-probs under the policy that sampled, finite where a token counts. None: the
            detached logprob_A.
        advantage_A: [A] floating.
        entropy_A: [A] floating, nats. Required if entropy_coef is not 0.
        ref_logprob_A: [A] floating, log-probs under the reference. Required if kl_coef is not 0.
        mask_A: [A], bool, integers, or floats of 0 and 1; 0 if the token does not count. What it holds then, NaN
            included, has no effect.
        weight_A: [A] floating, factor of each token's loss.
        normalizer: Number > 0 or 0-dim tensor, for example the token count over all ranks.
        clip_low: Lower clip distance of rho, in [0, 1].
        clip_high: Upper clip distance of rho, >= 0.
        dual_clip: Number > 1, or None for no dual clip.
        kl_coef: Number >= 0 or 0-dim tensor, factor of the KL against the reference.
        kl_estimator: k1, k2, k3 or abs: the value of the KL term (see `kl_divergence`).
        kl_gradient: "k2": the KL term has the gradient of k2, whatever its value; "raw": that of the estimator.
        entropy_coef: Number or 0-dim tensor, factor of the entropy bonus.
        moments: Moments that whiten the advantage. None: the advantage is used as it is.
        shift_mean: Whether whitening subtracts the mean.
        surrogate: "clip" or "mask".

    Returns:
        PPOLoss: `loss`, 0-dim fp32 (fp64 if an input is), and `stats`, detached sums in fp64.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong, kl_coef or entropy_coef lacks its stream, or a counted old
            log-prob on the CPU is not finite. On a device loss and gradient are then NaN.
    """
    op = "ppo_policy_loss"
    validate.check_floating(op, "logprob_A", logprob_A, (None,))
    if entropy_A is not None:
        validate.check_floating(op, "entropy_A", entropy_A, tuple(logprob_A.shape), logprob_A)
    elif may_be_nonzero(entropy_coef):
        raise ValueError(f"{op}: entropy_A must be given when entropy_coef is {entropy_coef}, got None")
    objective = PolicyObjective(
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator, kl_gradient, entropy_coef, moments, shift_mean, surrogate
    )
    streams = PolicyStreams(old_logprob_A, advantage_A, ref_logprob_A, mask_A, weight_A)
    streams = check_policy_inputs(op, logprob_A, streams, objective, normalizer)
    run = select(op, logprob_A, streams.old_logprob_A, streams.advantage_A)
    return run(logprob_A, entropy_A, streams, objective, normalizer)
