"""REINFORCE++: the discounted sum of the rewards from a token on, whitened over the global batch. No critic.

    A_t = sum over k >= 0 of gamma^k * reward_{t+k}        reward_t as for GAE: token rewards, KL penalty, total score

It is the recursion of GAE with V = 0 and lambda = 1. Whitening, without which it is plain REINFORCE, is the loss's
(`ppo.whiten_advantages`). Source: Hu 2025, arXiv:2501.03262.
"""

from __future__ import annotations

from icegrt.ppo.advantages.estimator import Estimator

REINFORCE = Estimator(discount=lambda config: (config.gamma, 1.0))
