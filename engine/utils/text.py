"""Text for people: durations, and errors in one line."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return seconds as text: `4.2 ms`, `8.4 s`, `3 min 20 s`, `2 h 05 min`."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
