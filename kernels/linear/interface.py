"""Log-probabilities of labels from hidden states and the head's weight, without the logit matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validate as checks
from ..dispatch import select
from ..types import TokenLogprobs, VocabShard


def linear_logprobs(
    hidden_AH: Tensor,
    weight_VH: Tensor,
    labels_A: Tensor,
    *,
    mask_A: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    weight_grad_out: Tensor | None = None,
) -> TokenLogprobs:
    """token_logprobs(hidden @ weight.T, labels), chunk by chunk; rows that mask_A drops never meet the head.

    hidden_AH: [A, H] floating; weight_VH: [V, H] floating, this rank's slice where `shard` has a group; labels_A: [A]
    int, global ids, -100 to ignore. mask_A: [A], 0 to ignore. chunk_rows: rows per chunk, None for a default that
    follows from V alone. Rounding depends on which rows share a chunk: for a ratio of exactly 1, score and update with
    the same rows, mask_A and chunk_rows. weight_grad_out: [V, H] fp32 buffer that backward adds dW to; then
    weight_VH.grad_added_to_main_grad is set and autograd sees no dW.
    Returns TokenLogprobs in fp32 (fp64 if an input is). Logits leave the product in fp32. The gradient of hidden_AH is
    summed over the shard's group, whose ranks must pass the same rows and the same upstream gradient; a frozen input
    costs no gradient. Raises TypeError or ValueError naming the argument.
    """
    op = "linear_logprobs"
    check_head(op, hidden_AH, weight_VH, labels_A, mask_A, temperature, shard, chunk_rows, weight_grad_out)
    return select(op, hidden_AH, weight_VH)(
        hidden_AH,
        weight_VH,
        labels_A,
        mask_A=mask_A,
        temperature=float(temperature),
        entropy=bool(entropy),
        shard=shard,
        chunk_rows=chunk_rows,
        weight_grad_out=weight_grad_out,
    )


def check_head(op, hidden_AH, weight_VH, labels_A, mask_A, temperature, shard, chunk_rows, weight_grad_out) -> None:
    """Checks the arguments that both linear operations share."""
    checks.floating(op, "hidden_AH", hidden_AH, (None, None))
    checks.floating(op, "weight_VH", weight_VH, (None, hidden_AH.shape[1]), hidden_AH)
    if hidden_AH.dtype != weight_VH.dtype and not torch.is_autocast_enabled(hidden_AH.device.type):
        raise TypeError(
            f"{op}: hidden_AH and weight_VH must have one dtype (or run under autocast), got {hidden_AH.dtype} and "
            f"{weight_VH.dtype}"
        )
    checks.integral(op, "labels_A", labels_A, (hidden_AH.shape[0],), hidden_AH)
    checks.mask(op, "mask_A", mask_A, (hidden_AH.shape[0],), hidden_AH)
    checks.plain_number(op, "temperature", temperature, low=0.0, above=True)
    checks.shard(op, shard, weight_VH.shape[0])
    if weight_VH.shape[0] == 0:
        raise ValueError(f"{op}: weight_VH must have at least one row, got shape {tuple(weight_VH.shape)}")
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"{op}: chunk_rows must be an int >= 1 or None, got {chunk_rows!r}")
    if weight_grad_out is not None:
        checks.floating(op, "weight_grad_out", weight_grad_out, tuple(weight_VH.shape), weight_VH)
        wanted = checks.wide_dtype(hidden_AH, weight_VH)
        if weight_grad_out.dtype != wanted or weight_grad_out.requires_grad:
            raise ValueError(
                f"{op}: weight_grad_out must be a {wanted} buffer that requires no gradient, got "
                f"{weight_grad_out.dtype} with requires_grad={weight_grad_out.requires_grad}"
            )
    vocab_size = weight_VH.shape[0] if shard is None else shard.vocab_size
    masked = labels_A if mask_A is None else torch.where(mask_A != 0, labels_A, checks.IGNORED_LABEL)
    checks.labels_in_range(op, masked, vocab_size)
