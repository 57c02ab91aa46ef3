"""Estimators of the advantages by the name in `ppo.advantage`: one module each."""

from icegrt.ppo.advantages.estimator import Estimator
from icegrt.ppo.advantages.gae import GAE
from icegrt.ppo.advantages.grpo import GRPO
from icegrt.ppo.advantages.reinforce import REINFORCE
from icegrt.ppo.advantages.rloo import RLOO
from icegrt.ppo.advantages.sequences import compare_sequences

ESTIMATORS: dict[str, Estimator] = {"gae": GAE, "rloo": RLOO, "grpo": GRPO, "reinforce++": REINFORCE}

__all__ = ["ESTIMATORS", "Estimator", "compare_sequences"]
