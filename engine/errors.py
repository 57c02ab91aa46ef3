"""Errors that the user can fix. The message names the file, line or key and the remedy.

The command line prints them without a traceback; library users catch `UserError` or a subclass.
"""


class UserError(Exception):
    """An error that the user can fix. The message names the given value, the expected one and the remedy."""


class ConfigError(UserError, ValueError):
    """A configuration key that is unknown, mistyped, out of bounds or in conflict with another."""


class DataError(UserError, ValueError):
    """A data file, line or row that cannot be used."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing, incomplete or of an unsupported kind."""


class RewardError(UserError, RuntimeError):
    """A reward function that raised, timed out, or returned something that is not a finite number per sample."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or continue: its folder is not empty or not writable, or the loss is not finite."""


def attach_note(error: BaseException, note: str) -> None:
    """Attach a line to an error. The command prints it below the message, Python 3.11 and later below the traceback."""
    error.icegrt_note = note  # type: ignore[attr-defined]
    if hasattr(error, "add_note"):
        error.add_note(note)


def note_of(error: BaseException) -> str:
    """Return the line that `attach_note` has attached; empty without one."""
    return getattr(error, "icegrt_note", "")
