"""KL-shaped rewards, GAE, returns and moments in one pass."""

from .interface import shaped_gae

__all__ = ["shaped_gae"]
