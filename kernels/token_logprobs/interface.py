"""Log-probabilities of labels from logits, with optional entropy, over a vocabulary that may be sharded over ranks."""

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
    """Return the log-probability of each label, and optionally the entropy of each row.

    With z = logits / temperature and p = softmax(z):

        logprob = z[label] - log sum exp(z)
        entropy = -sum p log p

    A row with NaN has a log-prob, an entropy and a gradient of NaN. A row of -inf has log-prob -inf and entropy 0.
    The result is differentiable in logits_AV.

    Args:
        logits_AV: [A, V] floating, any strides; this rank's slice if `shard` has a group.
        labels_A: [A] int32 or int64, global ids; -100 ignores the row (log-prob 0, no gradient).
        temperature: Python number > 0. It divides in fp32, after the row's maximum is subtracted.
        entropy: Whether to compute entropies.
        shard: This rank's slice of the vocabulary. None: the columns are the vocabulary.
        inplace_backward: Allow backward to write the gradient over the logits' memory, which saves an [A, V] buffer
            (the Triton backend does). Another operation that saved the logits then raises autograd's version error.

    Returns:
        TokenLogprobs: `logprob_A` and `entropy_A` (or None), [A] in nats, fp32 (fp64 for fp64 logits), equal on every
        rank of the shard's group.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong, a CPU label is outside the vocabulary, or inplace_backward is
            set for a leaf or an expanded view. On a device such a label yields -inf.
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
