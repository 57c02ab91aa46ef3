"""Attention of rows over the pages of their sequences."""

from .interface import paged_attention

__all__ = ["paged_attention"]
