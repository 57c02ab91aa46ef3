"""Log-probabilities of labels from logits, with optional entropy, over a vocabulary that may be spread over ranks."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import TokenLogprobs, VocabShard


def token_logprobs(
    logits_AV: Tensor,
    labels_A: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
) -> TokenLogprobs:
    """log softmax(logits / temperature) at the labels, and the entropy of each row in nats.

    logits_AV: [A, V] floating, any strides; this rank's slice where `shard` has a group. labels_A: [A] int32 or int64
    global ids, -100 to ignore a row (log-prob 0, no gradient). temperature: Python number > 0, applied in fp32.
    inplace_backward: allows backward to write the gradient over the logits' memory, which saves an [A, V] buffer (the
    Triton backend does); whoever else saved the logits for a backward then gets autograd's error about it.
    Returns TokenLogprobs in fp32 (fp64 for fp64 logits), equal on every rank of the shard's group. Differentiable.
    Raises TypeError or ValueError for a wrong dtype, shape, device, temperature or (on CPU) label, and for
    inplace_backward on a leaf or an expanded view.
    """
    op = "token_logprobs"
    validate.check_floating(op, "logits_AV", logits_AV, (None, None))
    validate.check_integral(op, "labels_A", labels_A, (logits_AV.shape[0],), logits_AV)
    validate.check_plain_number(op, "temperature", temperature, low=0.0, above=True)
    validate.check_shard(op, shard, logits_AV.shape[1])
    if logits_AV.shape[1] == 0:
        raise ValueError(f"{op}: logits_AV must have at least one column, got shape {tuple(logits_AV.shape)}")
    validate.check_labels_in_range(op, labels_A, logits_AV.shape[1] if shard is None else shard.vocab_size)
    if inplace_backward:
        validate.check_overwritable(op, "logits_AV", logits_AV)
    return select(op, logits_AV)(
        logits_AV,
        labels_A,
        temperature=float(temperature),
        entropy=bool(entropy),
        shard=shard,
        inplace_backward=bool(inplace_backward),
    )
