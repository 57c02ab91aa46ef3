"""The root-mean-square norm of rows, and of their sums with a residual."""

from .interface import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
