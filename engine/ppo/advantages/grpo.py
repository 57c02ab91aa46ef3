"""Group-relative advantages: the reward less the mean of the prompt's, over a standard deviation. No critic.

    A_i = (r_i - mean of r) / std

`ppo.group_std` names the numbers of the population standard deviation: the rewards of the prompt (group; Shao et al.
2024, arXiv:2402.03300), of all responses of the iteration (batch; arXiv:2508.08221), or nothing is divided by (none;
Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
"""

from __future__ import annotations

from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.ppo.advantages.estimator import Estimator
from icegrt.ppo.advantages.groups import Groups


def group_relative(groups: Groups, config: PPOConfig) -> Tensor:
    """Return the advantage of each response, [N] float64; 0 where the rewards of its group are equal."""
    deviation_N = groups.deviation_N
    if config.group_std == "none":
        return deviation_N
    if config.group_std == "batch":
        # Without a spread no group has one, and all deviations are 0.
        return deviation_N / groups.batch_std.clamp(min=1e-30)
    std_N = groups.std_G[groups.group_N]
    return deviation_N / std_N.masked_fill(std_N == 0, 1.0)


GRPO = Estimator(discount=lambda config: (1.0, 1.0), compare=group_relative)
