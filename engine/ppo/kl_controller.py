"""The KL coefficient: fixed, or steered towards a target (Ziegler et al., 2019, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class FixedKL:
    """kl_coef never moves."""

    coef: float

    def update(self, kl_nats_per_response: float, responses: int) -> None:
        """Take note of an iteration's KL (over all ranks)."""

    def state(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing: the configuration says it, also in a run that is resumed with another value."""


@dataclass
class AdaptiveKL(FixedKL):
    """coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon.

    The KL is summed over a response and averaged over the global batch; it must be reduced over ranks first, or the
    coefficients of the ranks drift apart.
    """

    target_nats_per_response: float
    horizon_responses: int

    def update(self, kl_nats_per_response: float, responses: int) -> None:
        error = min(max(kl_nats_per_response / self.target_nats_per_response - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * responses / self.horizon_responses

    def load_state(self, state: dict[str, Any]) -> None:
        self.coef = float(state["coef"])


def kl_controller(config) -> FixedKL:
    """The controller that a `PPOConfig` asks for."""
    if config.kl_control == "adaptive":
        return AdaptiveKL(config.kl_coef, config.kl_target_nats_per_response, config.kl_horizon_responses)
    return FixedKL(config.kl_coef)
