"""The lambdas of GAE and the unit of its recursion, as the configuration names them.

    lambda_policy = max(0, 1 - 1 / (alpha * L))        adaptive, for a response of L unmasked tokens

Sources: two lambdas are those of VC-PPO (arXiv:2503.01491), the adaptive one that of VAPO (arXiv:2504.05118).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.ppo.batch_plan import BatchPlan


def recursion_keywords(config: PPOConfig, plan: BatchPlan) -> dict[str, Any]:
    """Return the arguments `lam`, `lam_value` and `unit` of `shaped_gae`; lambdas per response are [N], on the host."""
    lam = config.policy_lambda
    return {
        "lam": adaptive_lambda(plan.counted_lengths_N, config.lam_alpha) if lam == "adaptive" else lam,
        # None is the cheaper recursion with the same result.
        "lam_value": None if lam == config.value_lambda else config.value_lambda,
        "unit": config.advantage_unit,
    }


def adaptive_lambda(length_N: Tensor, alpha: float) -> Tensor:
    """Return the lambda of each response, [N] float32; 0 for a response without tokens.

    Args:
        length_N: [N] integers, unmasked tokens of each response.
        alpha: above 0; the horizon of the advantages is alpha times the length.
    """
    return torch.where(length_N > 0, 1 - 1 / (alpha * length_N.double()), 0.0).clamp(min=0).float()
