"""Fused token-level operations for PPO: plain torch tensors in and out, no engine behind them.

Each operation has one file named after it (what it takes, what it refuses), one meaning in plain PyTorch
(reference*.py) and, where it pays, a Triton kernel (*_triton.py) that `dispatch` imports only when it is chosen.
"""

from .dispatch import available_backends, describe, record_launches, use_backend
from .kl_divergence import kl_divergence
from .linear_logprobs import linear_logprobs
from .linear_ppo_loss import linear_ppo_loss
from .linear_products import default_chunk_rows
from .pack_padded import pack_padded
from .ppo_policy_loss import ppo_policy_loss
from .sample_tokens import sample_tokens
from .shaped_gae import shaped_gae
from .token_logprobs import token_logprobs
from .types import (
    Moments,
    PaddedActions,
    PolicyStats,
    PPOLoss,
    ShapedGAE,
    TokenLogprobs,
    ValueLoss,
    ValueStats,
    VocabShard,
)
from .value_loss import value_loss
from .whitening import masked_moments, whiten

__all__ = [
    "Moments",
    "PPOLoss",
    "PaddedActions",
    "PolicyStats",
    "ShapedGAE",
    "TokenLogprobs",
    "ValueLoss",
    "ValueStats",
    "VocabShard",
    "available_backends",
    "default_chunk_rows",
    "describe",
    "kl_divergence",
    "linear_logprobs",
    "linear_ppo_loss",
    "masked_moments",
    "pack_padded",
    "ppo_policy_loss",
    "record_launches",
    "sample_tokens",
    "shaped_gae",
    "token_logprobs",
    "use_backend",
    "value_loss",
    "whiten",
]
