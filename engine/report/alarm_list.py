"""The alarms of a run as a page lists them: each once, with the iterations in which it was raised again."""

from __future__ import annotations

import re
from collections.abc import Sequence

MOST_ITERATIONS = 6
_ITERATION = re.compile(r"^iteration (\d+)[:.]\s*", re.IGNORECASE)
_NUMBER = re.compile(r"\d[\d.,e+-]*")


def alarm_list(alarms: Sequence[str]) -> list[tuple[str, str]]:
    """Group messages that differ in numbers alone.

    Args:
        alarms: messages in the order of the run; they begin with their iteration.

    Returns:
        The first message of each group, and the iterations of the others as text; empty if there are none.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for alarm in alarms:
        match = _ITERATION.match(alarm)
        message, iteration = (alarm[match.end() :], match[1]) if match else (alarm, "")
        groups.setdefault(_NUMBER.sub("#", message), []).append((alarm, iteration))
    return [(group[0][0], _later([i for _, i in group[1:] if i], len(group) - 1)) for group in groups.values()]


def _later(iterations: list[str], count: int) -> str:
    if not count:
        return ""
    if not iterations:
        return f"{count} more times"
    shown = (
        iterations
        if len(iterations) <= MOST_ITERATIONS
        else [*iterations[: MOST_ITERATIONS - 1], "...", iterations[-1]]
    )
    return f"again in iteration{'s' if len(iterations) > 1 else ''} {', '.join(shown)} ({count} more)"
