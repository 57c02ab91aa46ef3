"""Rotation of a fused projection whose keys and values go to their slots of a paged cache."""

from .interface import rope_write_kv

__all__ = ["rope_write_kv"]
