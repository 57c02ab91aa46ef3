"""Inputs of shaped_gae: the tensors of a batch, and the numbers that shape its rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GAEInputs:
    """Tensors of one batch. A: actions of the packed stream, slack behind the last sequence included; N: sequences."""

    score_N: Tensor
    value_A: Tensor
    logprob_A: Tensor
    ref_logprob_A: Tensor | None  # None only if kl_coef is 0
    cu_actions: Tensor  # [N + 1] int: sequence n has the entries cu_actions[n] to cu_actions[n + 1]
    bootstrap_N: Tensor | None  # value after the last token; None: 0
    mask_A: Tensor | None  # 0: masked; None: all count
    token_reward_A: Tensor | None


@dataclass(frozen=True)
class GAECoefficients:
    """Numbers of one call. gamma: discount; kl_coef may be a 0-dim tensor on the device."""

    kl_coef: float | Tensor
    kl_estimator: str
    gamma: float
    lam: float | Tensor  # the lambda of the advantages: a number, or [N]
    lam_value: float | Tensor | None  # the lambda of the returns; None: return = advantage + value
    by_turn: bool  # whether the recursion runs over turns
