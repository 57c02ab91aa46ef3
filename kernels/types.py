"""What the kernels take and return: plain frozen dataclasses over tensors.

Statistics are sums, counts and extremes, never means: sums merge over micro-batches and ranks without
weights, and a mean of means is wrong as soon as two micro-batches differ in length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of the vocabulary.

    group: process group over which the slices make up the whole vocabulary, or None for a single rank.
    start: global id of the slice's first column.  size: its columns (padding included).
    vocab_size: the true vocabulary; columns with a global id >= vocab_size are padding and never count.
    """

    group: dist.ProcessGroup | None
    start: int
    size: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.start < 0 or self.vocab_size < 1:
            raise ValueError(
                f"VocabShard: expected size >= 1, start >= 0 and vocab_size >= 1, got size={self.size}, "
                f"start={self.start}, vocab_size={self.vocab_size}"
            )
        if self.group is None and self.start != 0:
            raise ValueError(
                f"VocabShard: a shard without a group holds everything; expected start=0, got {self.start}"
            )

    @property
    def valid(self) -> int:
        """Columns of this slice that are vocabulary and not padding (0 on a rank that holds padding only)."""
        return max(0, min(self.size, self.vocab_size - self.start))


@dataclass(frozen=True)
class TokenLogprobs:
    """logprob_A: log p(label); entropy_A: entropy of the row in nats, or None. Both 0 where the row is ignored."""

    logprob_A: Tensor
    entropy_A: Tensor | None


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations as 0-dim tensors, merged with Chan's rule; variance is m2 / count."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance; 0 for an empty set."""
        return self.m2 / self.count.clamp(min=1)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        safe = count.clamp(min=1)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / safe)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / safe)
        return Moments(count, mean, m2)

    def to(self, device: torch.device | str) -> Moments:
        """The same numbers on another device: a kernel reads them where its other arguments are."""
        return Moments(self.count.to(device), self.mean.to(device), self.m2.to(device))

    def reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Moments over every rank of `group` (None: the default group), merged in rank order: the same bits on all.

        A collective: ranks without elements must join with a count of 0.
        """
        mine = torch.stack([self.count, self.mean, self.m2])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        total = Moments(*parts[0].unbind())
        for part in parts[1:]:
            total = total.merge(Moments(*part.unbind()))
        return total


_MIN, _MAX = {"merge": "min"}, {"merge": "max"}


class _Mergeable:
    """merge and reduce for a dataclass of 0-dim tensors: fields add unless their metadata says min or max."""

    def merge(self, other):
        """The statistics of both together."""
        if type(other) is not type(self):
            raise TypeError(f"merge: expected {type(self).__name__}, got {type(other).__name__}")
        join = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
        return type(self)(
            **{
                f.name: join[f.metadata.get("merge", "sum")](getattr(self, f.name), getattr(other, f.name))
                for f in fields(self)
            }
        )

    def reduce(self, group: dist.ProcessGroup | None = None):
        """The statistics over every rank of `group` (None: the default group). A collective: empty ranks join too."""
        rules = {f.name: f.metadata.get("merge", "sum") for f in fields(self)}
        sums = [n for n, rule in rules.items() if rule == "sum"]
        tops = [n for n, rule in rules.items() if rule != "sum"]
        values = dict(zip(sums, _all_reduce([getattr(self, n) for n in sums], dist.ReduceOp.SUM, group), strict=True))
        if tops:
            # One collective serves both extremes: the minimum is the negated maximum of the negation.
            signed = [-getattr(self, n) if rules[n] == "min" else getattr(self, n) for n in tops]
            reduced = _all_reduce(signed, dist.ReduceOp.MAX, group)
            values |= {n: -v if rules[n] == "min" else v for n, v in zip(tops, reduced, strict=True)}
        return type(self)(**values)


def _all_reduce(values: Sequence[Tensor], op, group) -> list[Tensor]:
    packed = torch.stack(list(values))
    dist.all_reduce(packed, op=op, group=group)
    return list(packed.unbind())


@dataclass(frozen=True)
class PolicyStats(_Mergeable):
    """Sums over the counted (unmasked) tokens of a policy loss, 0-dim fp64 tensors. Only *loss_sum carry weight_A.

    kl_old_new_sum is k3 of log p_new - log p_old seen from the old policy: (ratio - 1) - log ratio.
    """

    count: Tensor
    weight_sum: Tensor
    loss_sum: Tensor  # the whole objective, before the normalizer
    policy_loss_sum: Tensor  # its clipped-surrogate part
    clipped_sum: Tensor  # tokens whose gradient the clip removed
    clipped_low: Tensor  # of those, ratio < 1 - clip_low
    clipped_high: Tensor  # of those, ratio > 1 + clip_high
    dual_clipped_sum: Tensor
    kl_old_new_sum: Tensor
    ratio_sum: Tensor
    entropy_sum: Tensor  # 0 where no entropy was given
    ref_kl_sum: Tensor  # value of kl_estimator; 0 where no reference was given
    logprob_sum: Tensor
    advantage_sum: Tensor  # after whitening
    advantage_sq_sum: Tensor
    ratio_min: Tensor = field(metadata=_MIN)  # +inf when empty
    ratio_max: Tensor = field(metadata=_MAX)  # -inf when empty
    logprob_diff_abs_max: Tensor = field(metadata=_MAX)  # max |logprob - old_logprob|; 0 when empty


@dataclass(frozen=True)
class ValueStats(_Mergeable):
    """Sums over the counted tokens of a value loss, 0-dim fp64 tensors; error = return - value.

    Only loss_sum carries weight_A.
    """

    count: Tensor
    weight_sum: Tensor
    loss_sum: Tensor
    clipped_sum: Tensor  # tokens whose gradient the clip removed
    value_sum: Tensor
    value_sq_sum: Tensor
    return_sum: Tensor
    return_sq_sum: Tensor
    error_sum: Tensor
    error_sq_sum: Tensor
    value_min: Tensor = field(metadata=_MIN)
    value_max: Tensor = field(metadata=_MAX)

    @property
    def explained_variance(self) -> Tensor:
        """1 - var(return - value) / var(return); 0 where the returns do not vary."""
        n = self.count.clamp(min=1)
        total = self.return_sq_sum / n - (self.return_sum / n) ** 2
        left = self.error_sq_sum / n - (self.error_sum / n) ** 2
        return torch.where(total > 0, 1 - left / total.clamp(min=1e-30), torch.zeros_like(total))


@dataclass(frozen=True)
class PPOLoss:
    """loss: this rank's sum over `normalizer`, 0-dim, differentiable; stats: detached sums."""

    loss: Tensor
    stats: PolicyStats


@dataclass(frozen=True)
class ValueLoss:
    """loss: this rank's sum over `normalizer`, 0-dim, differentiable; stats: detached sums."""

    loss: Tensor
    stats: ValueStats


@dataclass(frozen=True)
class ShapedGAE:
    """advantage_A, return_A, reward_A: per token, 0 at masked entries; kl_N: nats per response.

    moments are those of the unmasked advantages of this rank.
    """

    advantage_A: Tensor
    return_A: Tensor
    reward_A: Tensor
    kl_N: Tensor
    moments: Moments


@dataclass(frozen=True)
class PaddedActions:
    """The action stream of a padded [B, L] batch.

    action_rows_A: row of hidden.flatten(0, 1) whose hidden state predicts the action; action_tokens_A: the actions;
    token_rows_A: row of the action itself; cu_actions: int32 [B + 1]; last_rows_N: row of each sequence's last real
    token; shape: (B, L).
    """

    action_rows_A: Tensor
    action_tokens_A: Tensor
    token_rows_A: Tensor
    cu_actions: Tensor
    last_rows_N: Tensor
    shape: tuple[int, int]

    def select(self, x_BL: Tensor) -> Tensor:
        """Per-action entries of a [B, L, ...] tensor that is aligned with the tokens."""
        return x_BL.flatten(0, 1)[self.token_rows_A]

    def unpack(self, x_A: Tensor, fill: float = 0.0) -> Tensor:
        """[B, L, ...] with x_A at the place of each action token and `fill` elsewhere."""
        out = x_A.new_full((self.shape[0] * self.shape[1], *x_A.shape[1:]), fill)
        return out.index_copy(0, self.token_rows_A, x_A).unflatten(0, self.shape)
