"""The PPO policy loss over the action stream."""

from .interface import ppo_policy_loss

__all__ = ["ppo_policy_loss"]
