"""Pages of a KV cache: keys and values of rows written to slots, and blocks copied."""

from .interface import copy_blocks, write_kv

__all__ = ["copy_blocks", "write_kv"]
