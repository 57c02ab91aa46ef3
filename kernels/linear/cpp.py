"""The linear operations on CPU threads: the same chunks, with C++ between the products (csrc/logit_rows.hpp).

A row of logits is read twice for its statistics, by maximum and sums, and not written; scoring leaves it at that. The
gradient reads it once more and replaces it. PyTorch (torch_ops.py) takes four passes and a copy for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, dtype_name, hold
from ..common.vocab_rows import RowStats, TokenGrads, empty_row_stats
from ..dispatch import log_launch
from ..ppo_policy_loss.inputs import PolicyObjective, PolicyStreams
from ..ppo_policy_loss.reference import ppo_policy_loss
from ..types import PPOLoss, TokenLogprobs
from . import chunked
from .inputs import ChunkOps, HeadInputs, LogitsChunk
from .products import ChunkedHead
from .torch_ops import token_grads

# Legend
#   C  rows of a chunk                 L  rows of a chunk that have a gradient ("active")
#   v  rows of this rank's weight that are vocabulary
#   z  logits [C, v]


def _start(head: ChunkedHead) -> int:
    """Return the first column of this rank's slice of the vocabulary."""
    return 0 if head.shard is None else head.shard.start


def row_stats(head: ChunkedHead, z: Tensor, labels: Tensor) -> RowStats:
    """Return local statistics of each row; z keeps the logits."""
    rows, columns = z.shape
    if columns == 0:
        return empty_row_stats(z)
    labels = labels.long().contiguous()
    packed, dtype = z.new_empty(4, rows), dtype_name(z)
    assert dtype is not None and z.is_contiguous()
    log_launch("logit_statistics", "cpp")
    _C.logit_statistics(
        dtype,
        z.data_ptr(),
        labels.data_ptr(),
        _start(head),
        packed.data_ptr(),
        rows,
        columns,
        head.temperature,
        torch.get_num_threads(),
    )
    hold(z, labels, packed)
    # T is always formed, so that the other sums have the same bits with and without an entropy.
    if not head.entropy:
        packed[3].zero_()
    return RowStats(*packed.unbind())


def recompute_stats(head: ChunkedHead, z: Tensor, labels: Tensor) -> None:
    """Return None: the gradient reads the logits themselves and the statistics of the full rows."""


def logits_grad(head: ChunkedHead, chunk: LogitsChunk, grads: TokenGrads, active: Tensor | None) -> tuple[Tensor, None]:
    """Return dz [L, v] of the active rows, over the logits."""
    z = chunk.logits
    count = z.shape[0] if active is None else active.shape[0]
    if z.shape[1] == 0:
        return z[:count], None
    grads = grads.by_logits(head.temperature)
    entropy = None if grads.entropy is None else chunk.merged.entropy()
    columns = chunk.merged.max, chunk.merged.sum_exp, entropy, grads.logprob, grads.entropy
    of_rows = [None if x is None else x.to(z.dtype).contiguous() for x in columns]
    labels, dtype = chunk.labels.long().contiguous(), dtype_name(z)
    assert dtype is not None and z.is_contiguous()
    log_launch("logit_gradients", "cpp")
    _C.logit_gradients(
        dtype,
        z.data_ptr(),
        address(active),
        labels.data_ptr(),
        _start(head),
        tuple(map(address, of_rows)),
        count,
        z.shape[1],
        head.temperature,
        torch.get_num_threads(),
    )
    hold(z, active, labels, *of_rows)
    return z[:count], None


CPP_OPS = ChunkOps(row_stats, recompute_stats, logits_grad, token_grads, ppo_policy_loss)


def linear_logprobs(head: HeadInputs, entropy: bool) -> TokenLogprobs:
    """Return log-probs and entropies; see the public function."""
    return chunked.linear_logprobs(head, entropy, CPP_OPS)


def linear_ppo_loss(
    head: HeadInputs, streams: PolicyStreams, objective: PolicyObjective, normalizer: float | Tensor
) -> PPOLoss:
    """Return the loss and its statistics; see the public function."""
    return chunked.linear_ppo_loss(head, streams, objective, normalizer, CPP_OPS)
