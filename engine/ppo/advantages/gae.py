"""Generalised advantage estimation, with a critic.

    delta_t = reward_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lambda * A_{t+1}

Source: Schulman et al. 2016, arXiv:1506.02438.
"""

from __future__ import annotations

from icegrt.ppo.advantages.estimator import Estimator

GAE = Estimator(discount=lambda config: (config.gamma, config.lam))
