"""Causal attention of packed sequences."""

from .interface import packed_attention

__all__ = ["packed_attention"]
