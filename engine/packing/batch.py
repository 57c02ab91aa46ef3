"""Pack token lists into streams without padding.

A batch of N sequences is a *token stream* of T entries (prompt and response of every sequence, end to end) and an
*action stream* of A entries (one per response token). Log-probs, values, rewards and losses are on the action stream.
`action_rows_A` gathers the hidden states that predict the actions, so no logits of prompt tokens are computed.

Sequences with equal prompts may share the prompt's tokens. The token stream then consists of segments: the shared
prompts, the responses to each of them, the sequences that share nothing, and the tail. The action stream is the same.

An alignment tail may follow: a dummy last sequence without actions. It has one token if the batch is empty, and as many
as make T a multiple of `tail_multiple`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from icegrt import _C
from icegrt.packing.arrays import Integers, flatten, integer
from icegrt.packing.transfer import copy_to_device

_Batch = TypeVar("_Batch", bound="PackedBatch")

__all__ = ["PackedBatch", "pack", "unpack"]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """N sequences as two packed streams: T tokens, A actions. Suffixes name the first dimension.

    Lengths are lists on the host, wherever the tensors are: reading them never waits for a device.

    Attributes:
        tokens_T: int64, prompt and response tokens of every sequence end to end, then the tail. With shared prompts:
            each of these once, the responses to the first, to the second and so on, the other sequences, the tail.
        positions_T: int64, positions from 0 in every sequence and in the tail. Those of a response to a shared prompt
            continue the prompt's.
        cu_seqlens: int32, offsets of the segments in the token stream. Without shared prompts the segments are the
            sequences, N + 1 offsets; a tail is one more segment.
        action_tokens_A: int64, the response tokens of every sequence end to end.
        cu_actions: int32, N + 1 offsets into the action stream.
        action_rows_A: int64, the row of the token stream whose hidden state predicts the action: the row before it. The
            last row of a shared prompt is there once for each response.
        last_rows_N: int64, the row of each sequence's last token, which gives the score and the bootstrap value.
        action_mask_A: bool, False for tool or observation tokens inside a response; None: every action counts.
        max_seqlen: tokens of the longest segment.
        tail_tokens: number of alignment tokens at the end of the token stream.
        groups: the number of each sequence's shared prompt, in stream order from 0; -1: the sequence shares nothing.
            Empty: no prompt is shared.
        cu_groups: int32, offsets of the responses to each shared prompt, from the first response; None: no prompt is
            shared.
        lengths: tokens of each segment.
        group_sizes: number of responses to each shared prompt; empty: no prompt is shared.
        response_lengths: actions of each sequence.
        counted_rows_R: int64, the entries of the action stream that count, ascending; None: all count.
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
    groups: list[int]
    cu_groups: Tensor | None
    lengths: list[int] = field(init=False)
    group_sizes: list[int] = field(init=False)
    response_lengths: list[int] = field(init=False)
    counted_rows_R: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        mask_A = self.action_mask_A
        self._set("lengths", self.cu_seqlens.diff().tolist())
        counts = Counter(self.groups)
        self._set("group_sizes", [counts[group] for group in range(max(self.groups, default=-1) + 1)])
        self._set("response_lengths", self.cu_actions.diff().tolist())
        self._set("counted_rows_R", None if mask_A is None else mask_A.nonzero().squeeze(1))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def n_sequences(self) -> int:
        """Number of sequences, without the tail."""
        return self.last_rows_N.numel()

    @property
    def n_tokens(self) -> int:
        """Number of entries of the token stream, with the tail."""
        return self.tokens_T.numel()

    @property
    def n_actions(self) -> int:
        """Number of entries of the action stream."""
        return self.action_tokens_A.numel()

    @property
    def n_counted_actions(self) -> int:
        """Number of actions that count in means: the mask's sum."""
        return self.n_actions if self.counted_rows_R is None else self.counted_rows_R.numel()

    @property
    def counted_index(self) -> Tensor | slice:
        """The entries of the action stream that count, as an index: `counted_rows_R`, or slice(None)."""
        return slice(None) if self.counted_rows_R is None else self.counted_rows_R

    def to(self: _Batch, device: torch.device | str, *, non_blocking: bool = False) -> _Batch:
        """Return the batch with every tensor on `device`: one copy for all that are on the host.

        Args:
            device: where to.
            non_blocking: the host does not wait for the copy, which is from pinned memory.
        """
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = copy.copy(self)
        for name, x in copy_to_device(tensors, torch.device(device), non_blocking=non_blocking).items():
            moved._set(name, x)
        return moved

    def extended(self, kind: type[_Batch], **columns: Any) -> _Batch:
        """Return the same sequences as a batch of a subclass, whose further fields are `columns`."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(PackedBatch) if f.init}, **columns)

    def split_actions(self, x_A: Tensor) -> list[Tensor]:
        """Return views of `x_A`, one per sequence, in order.

        Raises:
            ValueError: the first dimension of `x_A` is not A.

        Shape:
            x_A: (A, ...).
        """
        if x_A.ndim == 0 or x_A.shape[0] != self.n_actions:
            raise ValueError(f"x_A: expected a first dimension of {self.n_actions} actions, got {tuple(x_A.shape)}")
        return list(torch.split(x_A, self.response_lengths)) if self.n_sequences else []


def pack(
    prompts: Sequence[Integers],
    responses: Sequence[Integers],
    *,
    action_masks: Sequence[Integers] | None = None,
    tail_multiple: int = 1,
    tail_token: int = 0,
    share_prompts: bool = False,
) -> PackedBatch:
    """Pack prompts and their responses into one batch on the CPU.

    Args:
        prompts: N sequences of token ids (lists, integer arrays or tensors), each of at least one token.
        responses: N sequences of token ids. An empty one gives a sequence without actions.
        action_masks: N sequences of 0/1 or bool as long as the responses; 0 marks tokens that the policy did not
            sample.
        tail_multiple: a tail makes T a multiple of this (the tensor-parallel size, with sequence parallelism).
        tail_token: token id of the tail.
        share_prompts: put a prompt that several sequences have into the stream once.

    Returns:
        The batch.

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
            invalid = flat_mask[(flat_mask != 0) & (flat_mask != 1)][0]
            raise ValueError(f"action_masks: expected 0, 1 or bool, got {invalid}")
        mask = torch.from_numpy(flat_mask.astype(np.bool_))
    out = _C.pack(
        prompt_tokens,
        prompt_offsets,
        response_tokens,
        response_offsets,
        mask_offsets,
        integer("tail_multiple", tail_multiple),
        integer("tail_token", tail_token),
        share_prompts,
    )
    if not out["groups"]:
        out["cu_groups"] = None
    tensors: dict[str, Any] = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in out.items()}
    return PackedBatch(action_tokens_A=torch.from_numpy(response_tokens), action_mask_A=mask, **tensors)


def unpack(batch: PackedBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the prompts and responses of a batch, N int64 views of the token stream each: the inverse of `pack`."""
    segments = batch.tokens_T.split(batch.lengths)
    n_shared = len(batch.group_sizes)
    groups = batch.groups or [-1] * batch.n_sequences
    # Responses come in the order of their prompts, and whole sequences after all of them.
    order = sorted(range(batch.n_sequences), key=lambda n: groups[n] % (n_shared + 1))
    prompts: list[Tensor] = [batch.tokens_T] * batch.n_sequences
    responses = list(prompts)
    for n, tokens in zip(order, segments[n_shared:], strict=False):  # a tail belongs to no sequence
        start = len(tokens) - batch.response_lengths[n]
        prompts[n] = tokens[:start] if groups[n] < 0 else segments[groups[n]]
        responses[n] = tokens[start:]
    return prompts, responses
