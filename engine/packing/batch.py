"""Token lists to packed streams, and sequences to micro-batches.

Nothing is padded. A batch of N sequences is a *token stream* of T entries (prompt and response of every sequence, end
to end) and an *action stream* of A entries (one per response token). Log-probs, values, rewards and losses live on the
action stream; `action_rows_A` gathers the hidden states that predict it, so prompt tokens never cost a logit.

The one exception is the alignment tail: a dummy last sequence without actions, one token where the batch would be
empty, and as many as make T a multiple of `tail_multiple`. Its tokens are counted in `tail_tokens`.

Imports numpy, torch and the C++ extension only, so it can be used without the rest of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icegrt import _C
from icegrt.packing.arrays import Integers, flatten, integer

__all__ = ["PackedBatch", "pack", "unpack"]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """N sequences as two packed streams: T tokens, A actions. Suffixes name the first dimension.

    Attributes:
        tokens_T: int64, prompt and response tokens of every sequence end to end, then the tail if there is one.
        positions_T: int64, counting from 0 in every sequence and in the tail.
        cu_seqlens: int32, N + 1 offsets into the token stream, and one more where there is a tail.
        action_tokens_A: int64, the response tokens of every sequence end to end.
        cu_actions: int32, N + 1 offsets into the action stream.
        action_rows_A: int64, the row of the token stream whose hidden state predicts the action: the row before it.
        last_rows_N: int64, the row of each sequence's last token, where the score and the bootstrap value are read.
        action_mask_A: bool, False for tool or observation tokens inside a response; None counts every action.
        max_seqlen: longest sequence in tokens, the tail included.
        tail_tokens: number of alignment tokens at the end of the token stream.
    """

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    action_tokens_A: Tensor
    cu_actions: Tensor
    action_rows_A: Tensor
    last_rows_N: Tensor
    action_mask_A: Tensor | None
    max_seqlen: int
    tail_tokens: int

    @property
    def n_sequences(self) -> int:
        """Sequences, without the tail."""
        return self.last_rows_N.numel()

    @property
    def n_tokens(self) -> int:
        """Entries of the token stream, with the tail: what the model computes."""
        return self.tokens_T.numel()

    @property
    def n_actions(self) -> int:
        """Entries of the action stream."""
        return self.action_tokens_A.numel()

    @property
    def n_counted_actions(self) -> int:
        """Actions that count in means: the mask's sum (waits for the device when the mask lives on one)."""
        return self.n_actions if self.action_mask_A is None else int(self.action_mask_A.sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()})

    def split_actions(self, x_A: Tensor) -> list[Tensor]:
        """Views of `x_A` ([A, ...]), one per sequence, in order.

        Raises:
            ValueError: the first dimension of `x_A` is not A.
        """
        if x_A.ndim == 0 or x_A.shape[0] != self.n_actions:
            raise ValueError(f"x_A: expected a first dimension of {self.n_actions} actions, got {tuple(x_A.shape)}")
        return list(torch.split(x_A, torch.diff(self.cu_actions).tolist())) if self.n_sequences else []


def pack(
    prompts: Sequence[Integers],
    responses: Sequence[Integers],
    *,
    action_masks: Sequence[Integers] | None = None,
    tail_multiple: int = 1,
    tail_token: int = 0,
) -> PackedBatch:
    """Packs prompts and their responses into one batch; the result lives on the CPU.

    Args:
        prompts: N sequences of token ids (lists, integer arrays or tensors), each of at least one token.
        responses: N sequences of token ids, each possibly empty (a sequence without actions).
        action_masks: N sequences of 0/1 or bool as long as the responses; 0 marks tokens the policy did not choose.
        tail_multiple: a tail makes T a multiple of this (the tensor-parallel size under sequence parallelism).
        tail_token: token id of the tail.

    Raises:
        ValueError: lengths do not match, a prompt is empty, a token id is negative or not an integer, a mask is not
            0/1, or the batch exceeds int32 offsets. The message names the argument and the sequence.
    """
    prompt_tokens, prompt_offsets = flatten("prompts", prompts)
    response_tokens, response_offsets = flatten("responses", responses)
    mask, mask_offsets = None, None
    if action_masks is not None:
        flat_mask, mask_offsets = flatten("action_masks", action_masks, kinds="iub")
        if flat_mask.size and not ((flat_mask == 0) | (flat_mask == 1)).all():
            bad = flat_mask[(flat_mask != 0) & (flat_mask != 1)][0]
            raise ValueError(f"action_masks: expected 0, 1 or bool, got {bad}")
        mask = torch.from_numpy(flat_mask.astype(np.bool_))
    out = _C.pack(
        prompt_tokens,
        prompt_offsets,
        response_tokens,
        response_offsets,
        mask_offsets,
        integer("tail_multiple", tail_multiple),
        integer("tail_token", tail_token),
    )
    tensors: dict[str, Any] = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in out.items()}
    return PackedBatch(action_tokens_A=torch.from_numpy(response_tokens), action_mask_A=mask, **tensors)


def unpack(batch: PackedBatch) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of `pack`: prompts and responses, N int64 views of the token stream each; the tail is left out."""
    ends = batch.cu_seqlens.tolist()[: batch.n_sequences + 1]
    n_actions = torch.diff(batch.cu_actions).tolist()
    starts = [end - n for end, n in zip(ends[1:], n_actions)]
    prompts = [batch.tokens_T[a:b] for a, b in zip(ends, starts)]
    return prompts, [batch.tokens_T[a:b] for a, b in zip(starts, ends[1:])]
