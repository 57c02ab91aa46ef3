"""token_logprobs in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import vocab_rows
from ..types import TokenLogprobs, VocabShard
from ..validate import IGNORED_LABEL, wide_dtype

# Legend: A, actions of the packed stream; V, columns of this rank's slice; z = logits / temperature, [A, V] wide.


def token_logprobs(
    logits_AV: Tensor,
    labels_A: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,  # a permission that autograd does not use
) -> TokenLogprobs:
    """Return log-probs and entropies; see the public function."""
    if shard is not None and shard.group is not None:
        return vocab_rows.token_logprobs(logits_AV, labels_A, temperature, entropy, shard)
    # 1. Scale in the wide dtype. Columns beyond the vocabulary leave first.
    ignored_A = labels_A == IGNORED_LABEL
    if shard is not None:
        logits_AV = logits_AV[:, : shard.valid]
    z_AV = logits_AV.to(wide_dtype(logits_AV))
    if temperature != 1.0:
        z_AV = z_AV / temperature
    if labels_A.device.type != "cpu" or ignored_A.any():
        # Zeroing the row itself, not only its result, keeps a NaN row out of the gradient (0 * NaN is NaN).
        z_AV = z_AV.masked_fill(ignored_A[:, None], 0.0)
    # 2. Log-prob of the label: -inf if the label is beyond the vocabulary.
    logp_AV = torch.log_softmax(z_AV, dim=-1)
    label_A = labels_A.long().clamp(0, z_AV.shape[1] - 1)
    logprob_A = logp_AV.gather(1, label_A[:, None]).squeeze(1)
    logprob_A = torch.where(labels_A < z_AV.shape[1], logprob_A, -torch.inf).masked_fill(ignored_A, 0.0)
    if not entropy:
        return TokenLogprobs(logprob_A, None)
    # 3. Entropy. p log p -> 0 as p -> 0: clamping log p, where p is 0 anyway, keeps 0 * -inf out of both directions.
    entropy_A = -(logp_AV.exp() * logp_AV.clamp(min=-1e4)).sum(-1)
    return TokenLogprobs(logprob_A, entropy_A.masked_fill(ignored_A, 0.0))
