"""The linear operations with Triton between the products: the same chunks, and the row kernels of their neighbours.

A chunk's statistics come from token_logprobs' forward kernel, its token gradients from ppo_policy_loss' one launch, and
its logit gradient from token_logprobs' backward kernel, which reads only active rows and writes them close together in
the dtype of the product. Scoring and update launch the same compiled forward kernel: that, and not luck with the
compiler's contractions, makes their log-probs equal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.vocab_rows import RowStats, TokenGrads
from ..ppo_policy_loss.inputs import PolicyObjective, PolicyStreams
from ..ppo_policy_loss.triton import policy_launch, ppo_policy_loss
from ..token_logprobs.triton import Columns, ScoredRows, gradient_launch, statistics_launch
from ..types import PPOLoss, TokenLogprobs
from . import chunked
from .inputs import ChunkOps, HeadInputs, LogitsChunk
from .products import ChunkedHead

# Legend
#   C  rows of a chunk                 L  rows of a chunk that have a gradient ("active")
#   v  rows of this rank's weight that are vocabulary
#   z  logits [C, v]


def _columns(z: Tensor, head: ChunkedHead) -> Columns:
    # z is vocabulary only.
    return Columns(0 if head.shard is None else head.shard.start, z.shape[1], head.temperature)


def row_stats(head: ChunkedHead, z: Tensor, labels: Tensor) -> RowStats:
    """Return local statistics of each row; z keeps the logits."""
    return statistics_launch(z, labels, _columns(z, head), head.entropy)


def recompute_stats(head: ChunkedHead, z: Tensor, labels: Tensor) -> None:
    """Return None: the gradient kernel reads the logits themselves and the statistics of the full rows."""


def logits_grad(head: ChunkedHead, chunk: LogitsChunk, grads: TokenGrads, active: Tensor | None) -> tuple[Tensor, None]:
    """Return dz [L, v] of the active rows in the product's dtype, over the logits if dtype and rows allow."""
    z, dtype = chunk.logits, head.weight_VH.dtype
    if active is None and dtype == z.dtype:
        out = z
    else:
        # A gradient in another dtype, or of rows that move, may not overwrite what other programs still read.
        count = z.shape[0] if active is None else active.shape[0]
        out = torch.empty(count, z.shape[1], dtype=dtype, device=z.device)
    rows = ScoredRows(chunk.labels, chunk.merged, None if grads.entropy is None else chunk.merged.entropy())
    gradient_launch(z, rows, grads, out, active, _columns(z, head))
    return out, None


def token_grads(
    logprob: Tensor, entropy: Tensor | None, streams: PolicyStreams, objective: PolicyObjective
) -> TokenGrads:
    """Return d objective / d log-prob and d objective / d entropy of each token."""
    grads, _ = policy_launch(logprob, entropy, streams, objective, 1.0)
    return grads


TRITON_OPS = ChunkOps(row_stats, recompute_stats, logits_grad, token_grads, ppo_policy_loss)


def linear_logprobs(head: HeadInputs, entropy: bool) -> TokenLogprobs:
    """Return log-probs and entropies; see the public function."""
    return chunked.linear_logprobs(head, entropy, TRITON_OPS)


def linear_ppo_loss(
    head: HeadInputs, streams: PolicyStreams, objective: PolicyObjective, normalizer: float | Tensor
) -> PPOLoss:
    """Return the loss and its statistics; see the public function."""
    return chunked.linear_ppo_loss(head, streams, objective, normalizer, TRITON_OPS)
