"""The KL coefficient: fixed, or adapted to a target KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icegrt.config import PPOConfig


@dataclass
class FixedKL:
    """A constant coefficient."""

    coef: float

    def update(self, kl_nats_per_response: float, responses: int) -> None:
        """Take in an iteration's mean KL over all ranks and its number of responses."""

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        return {"coef": self.coef}

    def load_state(self, state: dict[str, Any]) -> None:
        """Keep the configuration's value: a run may be resumed with another one."""


@dataclass
class AdaptiveKL(FixedKL):
    """A coefficient that follows a target of the KL (Ziegler et al., 2019, section 2.2).

        coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon

    KL: nats, summed over a response, averaged over the responses of all ranks. It must be reduced over ranks before, or
    the coefficients of the ranks drift apart.
    """

    target_nats_per_response: float
    horizon_responses: int

    def update(self, kl_nats_per_response: float, responses: int) -> None:
        """Move the coefficient against the KL's relative distance from its target."""
        error = min(max(kl_nats_per_response / self.target_nats_per_response - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * responses / self.horizon_responses

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the coefficient of a checkpoint."""
        self.coef = float(state["coef"])


def kl_controller(config: PPOConfig) -> FixedKL:
    """Return the controller named by `kl_control`."""
    if config.kl_control == "adaptive":
        return AdaptiveKL(config.kl_coef, config.kl_target_nats_per_response, config.kl_horizon_responses)
    return FixedKL(config.kl_coef)
