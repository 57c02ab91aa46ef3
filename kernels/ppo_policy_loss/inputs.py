"""Inputs of a policy loss beside log-prob and entropy, as one object for the objective and one for the streams."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..common.streams import may_be_nonzero
from ..stats import Moments
from ..validate import (
    KL_ESTIMATORS,
    check_choice,
    check_finite_rows,
    check_floating,
    check_mask,
    check_moments,
    check_number,
    check_plain_number,
)

# Legend: A, actions of the packed stream; every stream is [A].

SURROGATES = ("clip", "mask")


@dataclass(frozen=True)
class PolicyObjective:
    """Coefficients and choices of a policy loss: one value for all tokens of a call."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float | Tensor
    kl_estimator: str
    kl_gradient: str
    entropy_coef: float | Tensor
    moments: Moments | None  # None: the advantage is used as it is
    shift_mean: bool
    surrogate: str  # "clip": PPO's; "mask": 0 outside the clip bounds

    @property
    def has_kl(self) -> bool:
        """Whether the KL term may be nonzero."""
        return may_be_nonzero(self.kl_coef)

    @property
    def has_entropy(self) -> bool:
        """Whether the entropy term may be nonzero."""
        return may_be_nonzero(self.entropy_coef)


@dataclass(frozen=True)
class PolicyStreams:
    """Inputs by token [A] that a policy loss treats as constants."""

    old_logprob_A: Tensor | None  # None: the detached log-prob itself
    advantage_A: Tensor
    ref_logprob_A: Tensor | None
    mask_A: Tensor | None  # 0: the token does not count; None: all count
    weight_A: Tensor | None  # None: all 1

    def select(self, rows: slice) -> PolicyStreams:
        """Return the streams of some tokens."""
        return PolicyStreams(
            None if self.old_logprob_A is None else self.old_logprob_A[rows],
            self.advantage_A[rows],
            None if self.ref_logprob_A is None else self.ref_logprob_A[rows],
            None if self.mask_A is None else self.mask_A[rows],
            None if self.weight_A is None else self.weight_A[rows],
        )


def check_policy_inputs(
    op: str,
    like: Tensor,
    streams: PolicyStreams,
    objective: PolicyObjective,
    normalizer: float | Tensor,
    labels_A: Tensor | None = None,
) -> PolicyStreams:
    """Check the arguments that both policy losses share, and return the streams detached: they are constants."""
    shape = (like.shape[0],)
    # 1. Streams: one entry for each row of `like`.
    check_floating(op, "advantage_A", streams.advantage_A, shape, like)
    for name in ("old_logprob_A", "ref_logprob_A", "weight_A"):
        if getattr(streams, name) is not None:
            check_floating(op, name, getattr(streams, name), shape, like)
    check_mask(op, "mask_A", streams.mask_A, shape, like)
    if streams.old_logprob_A is not None:
        check_finite_rows(op, "old_logprob_A", streams.old_logprob_A, streams.mask_A, labels_A)
    # 2. Numbers. Coefficients may be 0-dim tensors; clip bounds are Python numbers, which kernels take by value.
    check_number(op, "normalizer", normalizer, low=0.0, above=True, like=like)
    check_plain_number(op, "clip_low", objective.clip_low, low=0.0, high=1.0)
    check_plain_number(op, "clip_high", objective.clip_high, low=0.0)
    if objective.dual_clip is not None:
        check_plain_number(op, "dual_clip", objective.dual_clip, low=1.0, above=True)
    check_number(op, "kl_coef", objective.kl_coef, low=0.0, like=like)
    check_number(op, "entropy_coef", objective.entropy_coef, like=like)
    check_choice(op, "kl_estimator", objective.kl_estimator, KL_ESTIMATORS)
    check_choice(op, "kl_gradient", objective.kl_gradient, ("k2", "raw"))
    check_choice(op, "surrogate", objective.surrogate, SURROGATES)
    if objective.surrogate == "mask" and objective.dual_clip is not None:
        raise ValueError(
            f"{op}: dual_clip must be None with surrogate 'mask', which bounds the ratio for both signs of the "
            f"advantage, got {objective.dual_clip}"
        )
    # 3. A KL term without a reference would be dropped silently.
    if streams.ref_logprob_A is None and objective.has_kl:
        raise ValueError(f"{op}: ref_logprob_A must be given when kl_coef is {objective.kl_coef}, got None")
    check_moments(op, objective.moments, like)
    constants = (streams.old_logprob_A, streams.ref_logprob_A, streams.weight_A)
    old, ref, weight = (None if x is None else x.detach() for x in constants)
    return PolicyStreams(old, streams.advantage_A.detach(), ref, streams.mask_A, weight)
