"""REINFORCE leave-one-out: the mean reward of the other responses to the prompt is the baseline. No critic.

    A_i = r_i - 1/(n - 1) * sum over j != i of r_j = n/(n - 1) * (r_i - mean of r)

Source: Ahmadian et al. 2024, arXiv:2402.14740.
"""

from __future__ import annotations

from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.ppo.advantages.estimator import Estimator
from icegrt.ppo.advantages.groups import Groups


def leave_one_out(groups: Groups, config: PPOConfig) -> Tensor:
    """Return the advantage of each response, [N] float64; 0 where the group has one reward alone."""
    count_N = groups.count_G[groups.group_N]
    return groups.deviation_N * count_N / (count_N - 1).clamp(min=1)


RLOO = Estimator(discount=lambda config: (1.0, 1.0), compare=leave_one_out)
