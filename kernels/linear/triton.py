"""The linear operations with Triton between the products: the same chunks, and the row kernels of their neighbours.

A chunk's statistics come from token_logprobs' forward kernel, its token gradients from ppo_policy_loss' one launch, its
logit gradient from token_logprobs' backward kernel, which reads only rows that have one and writes them close together
in the dtype of the product. Scoring and update launch one and the same compiled forward kernel: that, and not luck with
the compiler's contractions, makes their log-probs equal to the bit.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from ..common.vocab_rows import RowStats
from ..ppo_policy_loss.triton import policy_launch, ppo_policy_loss
from ..token_logprobs.triton import gradient_launch, statistics_launch
from ..types import VocabShard
from . import chunked
from .products import ChunkedHead

__all__ = [
    "gradient",
    "linear_logprobs",
    "linear_ppo_loss",
    "policy_loss",
    "recompute_stats",
    "statistics",
    "token_gradients",
]

policy_loss = ppo_policy_loss


def statistics(z: Tensor, labels: Tensor, shard: VocabShard | None, entropy: bool) -> RowStats:
    """Local statistics of each row; z [C, v] holds vocabulary only, over the temperature already."""
    start = 0 if shard is None else shard.start
    return statistics_launch(z, labels, start, z.shape[1], 1.0, entropy)


def recompute_stats(z: Tensor, labels: Tensor, shard: VocabShard | None) -> None:
    """Nothing: the gradient kernel reads the logits themselves and the statistics of the whole rows."""


def gradient(
    z: Tensor,
    labels: Tensor,
    local: RowStats | None,
    rows: RowStats,
    active: Tensor | None,
    head: ChunkedHead,
    g: Tensor,
    h: Tensor | None,
) -> tuple[Tensor, None]:
    """(dz [L, v] of the rows `active`, in the product's dtype; over z itself where dtype and rows allow)."""
    dtype = head.weight_VH.dtype
    count = z.shape[0] if active is None else active.shape[0]
    if active is None and dtype == z.dtype:
        out = z
    else:
        out = torch.empty(count, z.shape[1], dtype=dtype, device=z.device)
    start = 0 if head.shard is None else head.shard.start
    entropy = None if h is None else rows.entropy()
    gradient_launch(z, labels, rows, entropy, g, h, out, active, start, z.shape[1], 1.0)
    return out, None


def token_gradients(logprob, entropy, old, advantage, ref, weight, kept, **terms) -> tuple[Tensor, Tensor | None]:
    """d objective / d log-prob and / d entropy of each token."""
    g, h, _ = policy_launch(logprob, old, advantage, entropy, ref, kept, weight, normalizer=1.0, **terms)
    return g, None if entropy is None else h


linear_logprobs = functools.partial(chunked.linear_logprobs, steps=sys.modules[__name__])
linear_ppo_loss = functools.partial(chunked.linear_ppo_loss, steps=sys.modules[__name__])
