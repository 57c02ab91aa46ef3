"""Fused token-level operations for PPO: plain torch tensors in and out, no engine behind them.

Each operation has a folder named after it: `interface.py` (the public function, which checks its arguments),
`reference.py` (plain PyTorch) and, for speed, `triton.py` or `cpp.py`, which `dispatch` imports only when chosen. If an
operation has many arguments, `inputs.py` has the frozen objects that its backends take.
"""

from .decode_linear import decode_linear
from .dispatch import available_backends, describe, record_launches, use_backend
from .kl_divergence import kl_divergence
from .linear import default_chunk_rows, linear_logprobs, linear_ppo_loss
from .lm_logits import lm_logits
from .pack_padded import pack_padded
from .packed_attention import packed_attention
from .paged_attention import paged_attention
from .paged_kv import copy_blocks, write_kv
from .ppo_policy_loss import ppo_policy_loss
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rope_qkv
from .rope_write_kv import rope_write_kv
from .sample_tokens import sample_tokens
from .shaped_gae import shaped_gae
from .stats import Moments, PolicyStats, ValueStats
from .swiglu import swiglu
from .token_logprobs import token_logprobs
from .types import PaddedActions, PPOLoss, ShapedGAE, TokenLogprobs, ValueLoss, VocabShard
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
    "add_rms_norm",
    "available_backends",
    "copy_blocks",
    "decode_linear",
    "default_chunk_rows",
    "describe",
    "kl_divergence",
    "linear_logprobs",
    "linear_ppo_loss",
    "lm_logits",
    "masked_moments",
    "pack_padded",
    "packed_attention",
    "paged_attention",
    "ppo_policy_loss",
    "record_launches",
    "rms_norm",
    "rope",
    "rope_qkv",
    "rope_write_kv",
    "sample_tokens",
    "shaped_gae",
    "swiglu",
    "token_logprobs",
    "use_backend",
    "value_loss",
    "whiten",
    "write_kv",
]
