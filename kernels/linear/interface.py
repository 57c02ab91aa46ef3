"""Log-probabilities and policy loss from hidden states and the head's weight, without the logit matrix."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..dispatch import select
from ..ppo_policy_loss.inputs import PolicyObjective, PolicyStreams, check_policy_inputs
from ..stats import Moments
from ..types import PPOLoss, TokenLogprobs, VocabShard
from .inputs import HeadInputs, check_head_inputs


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
    rows_R: Tensor | slice | None = None,
) -> TokenLogprobs:
    """Return `token_logprobs` of hidden @ weight.T, chunk by chunk; masked rows never enter the product.

        logits = hidden @ weight.T
        logprob = log softmax(logits / temperature)[label]

    Logits leave the product in fp32. The gradient of hidden_AH is summed over the shard's group, whose ranks must pass
    the same rows and the same upstream gradient. A frozen input costs no gradient. Rounding depends on which rows share
    a chunk: for a ratio of exactly 1, score and update with the same rows, mask_A and chunk_rows.

    Args:
        hidden_AH: [A, H] floating.
        weight_VH: [V, H] floating, of the same dtype unless under autocast; this rank's slice if `shard` has a group.
        labels_A: [A] int32 or int64, global ids; -100 ignores the row.
        mask_A: [A], bool, integers, or floats of 0 and 1; 0 ignores the row, whatever it holds.
        temperature: Python number > 0.
        entropy: Whether to compute entropies.
        shard: This rank's slice of the vocabulary. None: the weight has all of it.
        chunk_rows: Rows of logits at a time. None: a default that depends on V and the kind of device alone.
        weight_grad_out: [V, H] fp32 buffer that backward adds dW to. Then weight_VH.grad_added_to_main_grad is set and
            autograd gets no dW. Only where a backward can follow.
        rows_R: [R] int64, the rows that mask_A and labels_A keep, ascending, or slice(None) for all rows. It has no
            effect on the result: on a device the host need not wait to learn how many rows count.

    Returns:
        TokenLogprobs: `logprob_A` and `entropy_A` (or None), [A] in nats, fp32 (fp64 if an input is), 0 at ignored
        rows. Differentiable in hidden_AH and weight_VH.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong, a CPU label is outside the vocabulary, rows_R on the CPU are
            other rows than mask_A and labels_A keep, or weight_grad_out is given where no backward can follow.
    """
    op = "linear_logprobs"
    head = HeadInputs(hidden_AH, weight_VH, labels_A, mask_A, temperature, shard, chunk_rows, weight_grad_out, rows_R)
    check_head_inputs(op, head)
    run = select(op, hidden_AH, weight_VH)
    return run(replace(head, temperature=float(temperature)), bool(entropy))


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
    rows_R: Tensor | slice | None = None,
    drop_inactive: bool = True,
    surrogate: str = "clip",
) -> PPOLoss:
    """Return `ppo_policy_loss` of `linear_logprobs`, in three matrix products and one pass over chunks.

        loss = ppo_policy_loss(linear_logprobs(hidden, weight, labels), old_logprob, advantage, ...)

    Source: Schulman et al. 2017 (arXiv:1707.06347); terms and their sources are those of `ppo_policy_loss`. The forward
    forms the gradient, in fp32 over the chunks, and backward scales it by the upstream scalar on the device. No
    gradient is formed under no_grad or for a frozen input. Under a vocabulary shard every rank of the group gets the
    same loss.

    Args:
        hidden_AH: [A, H] floating.
        weight_VH: [V, H] floating, of the same dtype unless under autocast; this rank's slice if `shard` has a group.
        labels_A: [A] int32 or int64, global ids; a row with -100 does not count.
        old_logprob_A: [A] floating, log-probs under the policy that sampled, finite where a row counts. None: the
            detached log-probs themselves.
        advantage_A: [A] floating.
        ref_logprob_A: [A] floating, log-probs under the reference. Required if kl_coef is not 0.
        mask_A: [A], bool, integers, or floats of 0 and 1; a row with 0 does not count, whatever it holds.
        weight_A: [A] floating, factor of each token's loss.
        normalizer: Number > 0 or 0-dim tensor, for example the token count over all ranks.
        clip_low: Lower clip distance of the ratio, in [0, 1].
        clip_high: Upper clip distance of the ratio, >= 0.
        dual_clip: Number > 1, or None for no dual clip.
        kl_coef: Number >= 0 or 0-dim tensor, factor of the KL against the reference.
        kl_estimator: "k1", "k2", "k3" or "abs": the value of the KL term.
        kl_gradient: "k2": the KL term has the gradient of k2, whatever its value; "raw": that of the estimator.
        entropy_coef: Number or 0-dim tensor, factor of the entropy bonus.
        temperature: Python number > 0 that divides the logits.
        moments: Moments that whiten the advantage. None: the advantage is used as it is.
        shift_mean: Whether whitening subtracts the mean.
        shard: This rank's slice of the vocabulary. None: the weight has all of it.
        chunk_rows: Rows of logits at a time. None: a default that depends on V and the kind of device alone.
        weight_grad_out: [V, H] fp32 buffer that backward adds dW to. Then weight_VH.grad_added_to_main_grad is set and
            autograd gets no dW. Only where a backward can follow.
        rows_R: [R] int64, the rows that mask_A and labels_A keep, ascending, or slice(None) for all rows. It has no
            effect on the result: on a device the host need not wait to learn how many rows count.
        drop_inactive: Whether rows without a gradient (clipped, zero advantage) are left out of the products of the
            backward. On a device the host then waits once per chunk: pass False where no row is clipped, as in the
            first step from the policy that sampled. A CPU always leaves them out.
        surrogate: "clip" or "mask": whether a row outside the clip bounds is clipped as in PPO, or has no loss.

    Returns:
        PPOLoss: `loss`, 0-dim fp32 (fp64 if an input is), this rank's sum over the normalizer, differentiable in
        hidden_AH and weight_VH; and `stats`, detached sums in fp64.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong, a CPU label is outside the vocabulary, a counted old log-prob on
            the CPU is not finite (on a device loss and gradient are then NaN), kl_coef lacks ref_logprob_A, rows_R on
            the CPU are other rows than mask_A and labels_A keep, or weight_grad_out is given where no backward can
            follow.
    """
    op = "linear_ppo_loss"
    head = HeadInputs(
        hidden_AH,
        weight_VH,
        labels_A,
        mask_A,
        temperature,
        shard,
        chunk_rows,
        weight_grad_out,
        rows_R,
        bool(drop_inactive),
    )
    check_head_inputs(op, head)
    objective = PolicyObjective(
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator, kl_gradient, entropy_coef, moments, shift_mean, surrogate
    )
    streams = PolicyStreams(old_logprob_A, advantage_A, ref_logprob_A, mask_A, weight_A)
    streams = check_policy_inputs(op, hidden_AH, streams, objective, normalizer, labels_A)
    run = select(op, hidden_AH, weight_VH)
    return run(replace(head, temperature=float(temperature)), streams, objective, normalizer)
