"""token_logprobs in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import vocab_rows
from ..types import TokenLogprobs, VocabShard
from ..validate import IGNORED_LABEL, wide_dtype

# Legend: A, actions of the packed stream; V, columns of this rank's slice; z, logits in the wide dtype [A, V], less
# their maximum and over the temperature if it is not 1.


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
    # 1. Scale in the wide dtype. Columns beyond the vocabulary leave first. The maximum is subtracted before the
    #    division: a quotient of -1e4 would be rounded by up to 5e-4.
    ignored_A = labels_A == IGNORED_LABEL
    if shard is not None:
        logits_AV = logits_AV[:, : shard.valid]
    z_AV = logits_AV.to(wide_dtype(logits_AV))
    max_A = z_AV.detach().amax(-1)
    no_logit_A = max_A == -torch.inf
    if temperature != 1.0:
        z_AV = (z_AV - vocab_rows.finite_or_zero(max_A)[:, None]) / temperature
    zeroed_A = ignored_A | no_logit_A
    if labels_A.device.type != "cpu" or zeroed_A.any():
        # Zeroing the row itself, not only its result, keeps a NaN row out of the gradient (0 * NaN is NaN).
        z_AV = z_AV.masked_fill(zeroed_A[:, None], 0.0)
    # 2. Log-prob of the label: -inf if the label is beyond the vocabulary, or the row has no finite logit.
    logp_AV = torch.log_softmax(z_AV, dim=-1)
    label_A = labels_A.long().clamp(0, z_AV.shape[1] - 1)
    logprob_A = logp_AV.gather(1, label_A[:, None]).squeeze(1)
    logprob_A = torch.where((labels_A < z_AV.shape[1]) & ~no_logit_A, logprob_A, -torch.inf).masked_fill(ignored_A, 0.0)
    if not entropy:
        return TokenLogprobs(logprob_A, None)
    # 3. Entropy. p log p -> 0 as p -> 0: clamping log p, where p is 0 anyway, keeps 0 * -inf out of both directions.
    entropy_A = -(logp_AV.exp() * logp_AV.clamp(min=-1e4)).sum(-1)
    return TokenLogprobs(logprob_A, entropy_A.masked_fill(zeroed_A, 0.0))
