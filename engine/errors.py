"""Errors meant for people: one message that names the file, line or key and says what to do.

The command line prints them without a traceback; library users catch `UserError` or the narrower class.
"""


class UserError(Exception):
    """Something the user can put right. The message says what was given, what was expected and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration key that is unknown, mistyped, out of bounds or in conflict with another."""


class DataError(UserError, ValueError):
    """A data file, line or row that cannot be used."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing, incomplete or of an unsupported kind."""


class RewardError(UserError, RuntimeError):
    """A reward function that raised, timed out, or returned something that is not a finite number per sample."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or go on: folder not empty, not writable, loss not finite."""
