"""Rotary position embeddings of queries and keys in one pass."""

from .interface import rope, rope_qkv

__all__ = ["rope", "rope_qkv"]
