"""Log-probs and entropies of given tokens, from logits."""

from .interface import token_logprobs

__all__ = ["token_logprobs"]
