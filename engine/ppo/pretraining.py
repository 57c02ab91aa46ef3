"""Value pretraining: iterations before the first PPO iteration in which the critic learns the initial actor's returns.

Returns are Monte-Carlo: GAE with lambda 1. Every iteration samples new responses and reads the critic's values of them
before it trains on them, so the explained variance of an iteration is that of held-out returns (VC-PPO,
arXiv:2503.01491).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.metrics import PPOStep
from icegrt.utils.console import print_info


class ValuePretraining:
    """Counts the pretraining iterations of a run, and stops them.

    Attributes:
        config: of a pretraining iteration: that of the run with lambda 1 and without value clipping, which would bound
            what the critic learns in an iteration.
        done_iterations: pretraining iterations so far; after the last one it does not change any more.
        explained_variance: the highest so far; None before the first iteration.
        is_over: whether PPO iterations come next.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = dataclasses.replace(config, lam=1.0, lam_policy=None, lam_value=None, value_clip=0.0)
        self._settings = config.critic.pretrain
        self.done_iterations = 0
        self.explained_variance: float | None = None
        self._without_improvement = 0
        self.is_over = self._settings.iterations == 0 or not config.has_critic

    @property
    def learning_rate(self) -> float:
        """The critic's learning rate in these iterations; its schedule starts after them."""
        return self._settings.lr or self.config.critic.optimizer.lr

    def most_iterations(self) -> int:
        """Return the number of pretraining iterations: those done, or if it goes on the largest number."""
        return self.done_iterations if self.is_over else self._settings.iterations

    def count(self, row: PPOStep) -> PPOStep:
        """Count an iteration, and decide whether it is the last one. Returns its metrics, marked as pretraining."""
        self._observe(row.value_explained_variance)
        if self.is_over:
            print_info(
                f"value pretraining is over after {self.done_iterations} iterations: it explains "
                f"{self.explained_variance:.3f} of the variance of new returns"
            )
        return dataclasses.replace(row, pretraining=True)

    def _observe(self, explained_variance: float) -> None:
        self.done_iterations += 1
        if self.explained_variance is None or explained_variance > self.explained_variance:
            self.explained_variance, self._without_improvement = explained_variance, 0
        else:
            self._without_improvement += 1
        patience = self._settings.patience
        has_settled = bool(patience) and self._without_improvement >= patience
        self.is_over = has_settled or self.done_iterations >= self._settings.iterations

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON."""
        return {
            "done_iterations": self.done_iterations,
            "explained_variance": self.explained_variance,
            "without_improvement": self._without_improvement,
            "is_over": self.is_over,
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Restore `state()`; None, of an older checkpoint: there was no pretraining, and there will be none.

        Raises:
            ConfigError: the configuration asks for pretraining, and the run began without.
        """
        had_none = state is None or (state["is_over"] and not state["done_iterations"])
        if had_none and not self.is_over:
            raise ConfigError(
                f"ppo.critic.pretrain.iterations is {self._settings.iterations}, but the run that resumes began "
                "without value pretraining, which comes before the first iteration. Set it to 0, or start a new run"
            )
        if state is None:
            self.is_over = True
            return
        self.done_iterations, self.is_over = state["done_iterations"], state["is_over"]
        self.explained_variance = state["explained_variance"]
        self._without_improvement = state["without_improvement"]
