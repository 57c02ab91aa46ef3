"""Moments of a masked stream, and whitening by them."""

from .interface import masked_moments, whiten

__all__ = ["masked_moments", "whiten"]
