"""Hooks into a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icegrt.ppo.experience import Experience
    from icegrt.ppo.trainer import PPOTrainer
    from icegrt.rollout.types import Response


class Callback:
    """Hooks into a run; override any of them. Every rank calls them, after the event."""

    def on_rollout(self, trainer: PPOTrainer, responses: list[Response]) -> None:
        """PPO: called when the responses of an iteration are sampled.

        Args:
            trainer: the trainer.
            responses: of all ranks.
        """

    def on_scores(self, trainer: PPOTrainer, experience: Experience) -> None:
        """PPO: called before the update; with `ppo.reuse_update_values` after the critic's first step.

        Args:
            trainer: the trainer.
            experience: log-probs, values, scores and advantages of this rank's responses.
        """

    def on_update(self, trainer: Any, step: Any) -> None:
        """All trainers: called at the end of an iteration (SFT and reward training: of an optimizer step).

        Args:
            trainer: the trainer. Set `trainer.total_steps` to stop early.
            step: the metrics, as the trainer yields them.
        """

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        """All trainers: called when a checkpoint is complete.

        Args:
            trainer: the trainer.
            path: the folder of the checkpoint.
        """
