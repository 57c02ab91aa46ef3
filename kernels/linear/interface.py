"""Log-probabilities of labels from hidden states and the head's weight, without the logit matrix."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import select
from ..types import Moments, PPOLoss, TokenLogprobs, VocabShard
from ..validate import check_head, check_objective


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


def linear_ppo_loss(
    hidden_AH: Tensor,
    weight_VH: Tensor,
    labels_A: Tensor,
    old_logprob_A: Tensor | None,
    advantage_A: Tensor,
    *,
    ref_logprob_A: Tensor | None = None,
    mask_A: Tensor | None = None,
    weight_A: Tensor | None = None,
    normalizer: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_estimator: str = "k2",
    kl_gradient: str = "k2",
    entropy_coef: float | Tensor = 0.0,
    temperature: float = 1.0,
    moments: Moments | None = None,
    shift_mean: bool = True,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    weight_grad_out: Tensor | None = None,
) -> PPOLoss:
    """ppo_policy_loss(linear_logprobs(hidden, weight, labels), ...) in three matrix products and one pass over chunks.

    Head arguments as in linear_logprobs, objective arguments as in ppo_policy_loss; rows with label -100 or mask_A 0
    do not count. The forward forms the gradient (in fp32 over the chunks) and backward scales it by the upstream
    scalar on the device; nothing is formed under no_grad or for a frozen input. The loss is this rank's sum over
    normalizer; under a vocabulary shard it is the same on every rank of the group.
    Returns PPOLoss(loss, stats). Raises TypeError or ValueError naming the argument.
    """
    op = "linear_ppo_loss"
    check_head(op, hidden_AH, weight_VH, labels_A, mask_A, temperature, shard, chunk_rows, weight_grad_out)
    terms = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "kl_gradient": kl_gradient,
        "entropy_coef": entropy_coef,
    }
    streams = check_objective(
        op, hidden_AH, old_logprob_A, advantage_A, ref_logprob_A, mask_A, weight_A, normalizer, moments, terms
    )
    old_logprob_A, advantage_A, ref_logprob_A, weight_A = streams
    return select(op, hidden_AH, weight_VH)(
        hidden_AH,
        weight_VH,
        labels_A,
        old_logprob_A,
        advantage_A,
        ref_logprob_A=ref_logprob_A,
        mask_A=mask_A,
        weight_A=weight_A,
        normalizer=normalizer,
        moments=moments,
        shift_mean=shift_mean,
        temperature=float(temperature),
        shard=shard,
        chunk_rows=chunk_rows,
        weight_grad_out=weight_grad_out,
        **terms,
    )
