"""What a failed run keeps: a checkpoint of the last whole step, if the failure has left that state in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.checkpoint import rng
from icegrt.checkpoint.directory import list_checkpoints, read_state
from icegrt.roles.role import TrainableRole, weights_are_finite


@dataclass(frozen=True)
class StepBoundary:
    """The end of the last whole step: all of a trainer's state beside its weights and optimizers.

    Attributes:
        step: number of finished steps.
        weight_changes: of each role; another number means that a later step has begun to change the weights.
        state: the trainer's state, as JSON; None while no later step has begun.
        generators: states of the global random generators; None while no later step has begun.
    """

    step: int
    weight_changes: list[int]
    state: str | None = None
    generators: dict[str, Any] | None = None

    @classmethod
    def before_step(cls, step: int, roles: Sequence[TrainableRole], state: dict[str, Any]) -> StepBoundary:
        """Record the boundary at which the next step begins."""
        return cls(step, [role.weight_changes for role in roles], json.dumps(state), rng.capture())

    @classmethod
    def after_step(cls, step: int, roles: Sequence[TrainableRole]) -> StepBoundary:
        """Record the boundary that a finished step has reached."""
        return cls(step, [role.weight_changes for role in roles])

    def is_in_memory(self, roles: Sequence[TrainableRole]) -> bool:
        """Return whether the weights are still those of the boundary, and finite."""
        changes = [role.weight_changes for role in roles]
        return self.weight_changes == changes and all(weights_are_finite(role) for role in roles)

    def document(self) -> dict[str, Any]:
        """Return what replaces the present state in the checkpoint of one rank."""
        if self.state is None:
            return {}
        return {"trainer": json.loads(self.state), "rng": [self.generators]}


def kept_note(section: str, folder: Path, step: int, total: int, unit: str) -> str:
    """Return the line that names what a failed run has kept, and the next command.

    Args:
        section: name of the stage.
        folder: the run's folder.
        step: number of finished steps.
        total: steps of the run.
        unit: name of the steps.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return f"kept: no checkpoint, after {step} of {total} {unit}; start again with {section}.run.resume=auto"
    kept = read_state(checkpoints[-1])["step"]
    done = f" ({step} were done)" if kept < step else ""
    return f"kept: {kept} of {total} {unit}{done}, in {checkpoints[-1]}; continue with --resume"
