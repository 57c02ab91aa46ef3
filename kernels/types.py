"""Arguments and results of the kernels: plain frozen dataclasses over tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from .stats import Moments, PolicyStats, ValueStats

# Legend: A, actions of the packed stream; N, sequences; B and L, extents of a padded batch.


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of the vocabulary.

    Attributes:
        group: Process group whose slices make up the vocabulary. None: a single rank has all of it.
        start: Global id of the slice's first column.
        size: Columns of the slice, padding included.
        vocab_size: Columns of the vocabulary. Columns with a global id >= vocab_size are padding and never count.

    Raises:
        ValueError: size < 1, start < 0, vocab_size < 1, or start > 0 without a group.
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
        """Columns of this slice that are vocabulary (0 on a rank whose columns are all padding)."""
        return max(0, min(self.size, self.vocab_size - self.start))


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs and entropies by token, 0 at ignored rows.

    Attributes:
        logprob_A: log p(label) in nats, [A] fp32 or fp64.
        entropy_A: Entropy of the row in nats, [A] fp32 or fp64; None if it was not requested.
    """

    logprob_A: Tensor
    entropy_A: Tensor | None


@dataclass(frozen=True)
class PPOLoss:
    """A policy loss.

    Attributes:
        loss: This rank's sum over `normalizer`, 0-dim fp32 or fp64, differentiable.
        stats: Detached sums over the same tokens.
    """

    loss: Tensor
    stats: PolicyStats


@dataclass(frozen=True)
class ValueLoss:
    """A value loss.

    Attributes:
        loss: This rank's sum over `normalizer`, 0-dim fp32 or fp64, differentiable.
        stats: Detached sums over the same tokens.
    """

    loss: Tensor
    stats: ValueStats


@dataclass(frozen=True)
class ShapedGAE:
    """Advantages, returns and rewards by token, 0 at masked and slack entries.

    Attributes:
        advantage_A: Generalised advantages, [A] fp32 or fp64.
        return_A: The target of the value loss, [A]; 0 where `value_mask_A` is False.
        reward_A: Rewards by token: KL penalty, token reward and score, [A].
        kl_N: KL estimate summed over each response, in nats, [N].
        moments: Moments of this rank's unmasked advantages, over tokens.
        value_mask_A: [A] bool, the first token of each turn, the only ones that have a return; pass it to the value
            loss as its mask. None: the unit is the token, and every unmasked entry has a return.
    """

    advantage_A: Tensor
    return_A: Tensor
    reward_A: Tensor
    kl_N: Tensor
    moments: Moments
    value_mask_A: Tensor | None = None


@dataclass(frozen=True)
class PaddedActions:
    """The action stream of a padded [B, L] batch. A row is an index into hidden.flatten(0, 1).

    Attributes:
        action_rows_A: Row whose hidden state predicts the action, [A] int64.
        action_tokens_A: The actions, [A] int64.
        token_rows_A: Row of the action itself, [A] int64.
        cu_actions: Where sequences begin in the stream, [B + 1] int32.
        last_rows_N: Row of each sequence's last attended token, [B] int64.
        shape: (B, L).
    """

    action_rows_A: Tensor
    action_tokens_A: Tensor
    token_rows_A: Tensor
    cu_actions: Tensor
    last_rows_N: Tensor
    shape: tuple[int, int]

    def select(self, x_BL: Tensor) -> Tensor:
        """Return the entries of the actions.

        Args:
            x_BL: [B, L, ...], aligned with the tokens.

        Returns:
            Tensor [A, ...].
        """
        return x_BL.flatten(0, 1)[self.token_rows_A]

    def unpack(self, x_A: Tensor, fill: float = 0.0) -> Tensor:
        """Return a padded tensor with the entries of a stream at their action tokens.

        Args:
            x_A: [A, ...].
            fill: Value of all other entries.

        Returns:
            Tensor [B, L, ...] in the dtype of x_A.
        """
        out = x_A.new_full((self.shape[0] * self.shape[1], *x_A.shape[1:]), fill)
        return out.index_copy(0, self.token_rows_A, x_A).unflatten(0, self.shape)
