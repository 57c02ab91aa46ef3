"""KL divergence per token."""

from .interface import kl_divergence

__all__ = ["kl_divergence"]
