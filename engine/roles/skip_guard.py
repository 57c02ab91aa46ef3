"""The end of a run whose losses or gradients stay not finite: the same rule in all stages."""

from __future__ import annotations

from collections.abc import Iterable

from icegrt.errors import RunError
from icegrt.roles.role import StepOutcome

# Consecutive steps of one role that may be skipped for a loss or gradient that is not finite.
MOST_SKIPPED = 3


class SkipGuard:
    """Count the consecutive skipped steps of each role, over iterations.

    Args:
        names: of the roles that train.

    Attributes:
        skipped_in_a_row: by role; part of a checkpoint.
    """

    def __init__(self, *names: str) -> None:
        self.skipped_in_a_row = dict.fromkeys(names, 0)

    def check(self, name: str, steps: Iterable[StepOutcome]) -> None:
        """Count the steps of a role.

        Raises:
            RunError: the third step in a row was skipped.
        """
        for step in steps:
            self.skipped_in_a_row[name] = self.skipped_in_a_row[name] + 1 if step.skipped else 0
            if self.skipped_in_a_row[name] >= MOST_SKIPPED:
                raise RunError(
                    f"{MOST_SKIPPED} optimizer steps in a row of the {name} had a loss or gradient that is not "
                    "finite; lower its learning rate"
                )
