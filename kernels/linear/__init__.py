"""Log-probs and the PPO policy loss straight from hidden states and the LM head, without whole logits."""

from .interface import linear_logprobs, linear_ppo_loss
from .products import default_chunk_rows

__all__ = ["default_chunk_rows", "linear_logprobs", "linear_ppo_loss"]
