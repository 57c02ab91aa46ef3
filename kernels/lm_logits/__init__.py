"""Logits of a language-model head in fp32, for sampling."""

from .interface import lm_logits

__all__ = ["lm_logits"]
