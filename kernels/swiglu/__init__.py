"""The gated activation of an MLP."""

from .interface import swiglu

__all__ = ["swiglu"]
