"""The projections of a decode step: a few rows times a weight that is read in place."""

from .interface import decode_linear

__all__ = ["decode_linear"]
