"""Log-probs, advantages and losses, written as their formulas are: eager PyTorch on padded rows, a loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def answer_logprobs(logits_NLV: Tensor, tokens_NL: Tensor, temperature: float) -> Tensor:
    """Return the log-prob of each next token under all logits of a batch, [N, L - 1] float32."""
    logprob_NLV = torch.log_softmax(logits_NLV[:, :-1].float() / temperature, dim=-1)
    return logprob_NLV.gather(-1, tokens_NL[:, 1:, None]).squeeze(-1)


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Return the advantages of an answer, from its last token to its first.

    A_t = r_t + gamma * V_{t+1} - V_t + gamma * lam * A_{t+1}    (Schulman et al. 2016, arXiv:1506.02438)
    """
    advantages, later, next_value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        later = delta + gamma * lam * later
        advantages[t], next_value = later, values[t]
    return advantages


def policy_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return the clipped surrogate of each token (Schulman et al. 2017, arXiv:1707.06347)."""
    ratio = torch.exp(logprob - old_logprob)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return half the larger of the squared errors of each token, with the value as it is and clipped."""
    error = (value - returns) ** 2
    if clip:
        error = torch.maximum(error, (old_value + (value - old_value).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * error
