"""The clipped value loss over the action stream."""

from .interface import value_loss

__all__ = ["value_loss"]
