"""Sampling with Gumbel noise from a counter-based hash."""

from .interface import sample_tokens

__all__ = ["sample_tokens"]
