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
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from icegrt import _C

__all__ = ["PackedBatch", "Plan", "Share", "balance", "pack", "unpack"]


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


@dataclass(frozen=True)
class Plan:
    """Which sequence goes where: `assignments[rank][micro_batch]` holds ascending sequence indices.

    Every rank has `n_micro_batches` micro-batches; some may be empty (`pack` gives those a one-token tail). `tokens`
    has the same shape as `assignments` and holds the tokens of each micro-batch, none above `token_budget`.
    """

    assignments: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    token_budget: int

    @property
    def ranks(self) -> int:
        return len(self.assignments)

    @property
    def n_micro_batches(self) -> int:
        """Micro-batches per rank."""
        return len(self.assignments[0])

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(sum, self.tokens))

    @property
    def max_tokens(self) -> int:
        """Tokens of the fullest micro-batch."""
        return max(map(max, self.tokens))

    @property
    def n_empty(self) -> int:
        """Micro-batches without a sequence."""
        return sum(not members for rank in self.assignments for members in rank)

    @property
    def fill(self) -> float:
        """Share of the budget in use: tokens over micro-batches times `token_budget`."""
        return self.n_tokens / (self.ranks * self.n_micro_batches * self.token_budget)

    @property
    def imbalance(self) -> float:
        """Fullest micro-batch over the mean one, >= 1; 1.0 for a plan without tokens."""
        n_tokens = self.n_tokens
        return self.max_tokens * self.ranks * self.n_micro_batches / n_tokens if n_tokens else 1.0

    @property
    def waste(self) -> float:
        """Share of lock-step time in which a rank waits for the fullest one of the same micro-batch, 0 when even."""
        slowest = sum(max(column) for column in zip(*self.tokens))
        return 1.0 - self.n_tokens / (slowest * self.ranks) if slowest else 0.0


@dataclass(frozen=True)
class Share:
    """What of a plan falls to one rank: its place among the data-parallel ranks, and how its micro-batches are cut.

    round_to: micro-batches come in multiples of this; tail_multiple: their tokens do (see `balance` and `pack`).
    """

    ranks: int = 1
    rank: int = 0
    round_to: int = 1
    tail_multiple: int = 1

    def assign(self, lengths: Sequence[int], token_budget: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Every rank's micro-batches of sequence indices (`Plan.assignments`)."""
        plan = balance(lengths, token_budget=token_budget, ranks=self.ranks, round_to=self.round_to)
        return plan.assignments


def pack(
    prompts: Sequence,
    responses: Sequence,
    *,
    action_masks: Sequence | None = None,
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
    prompt_tokens, prompt_offsets = _flatten("prompts", prompts)
    response_tokens, response_offsets = _flatten("responses", responses)
    mask, mask_offsets = None, None
    if action_masks is not None:
        flat_mask, mask_offsets = _flatten("action_masks", action_masks, kinds="iub")
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
        _integer("tail_multiple", tail_multiple),
        _integer("tail_token", tail_token),
    )
    tensors = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in out.items()}
    return PackedBatch(action_tokens_A=torch.from_numpy(response_tokens), action_mask_A=mask, **tensors)


def unpack(batch: PackedBatch) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse of `pack`: prompts and responses, N int64 views of the token stream each; the tail is left out."""
    ends = batch.cu_seqlens.tolist()[: batch.n_sequences + 1]
    n_actions = torch.diff(batch.cu_actions).tolist()
    starts = [end - n for end, n in zip(ends[1:], n_actions)]
    prompts = [batch.tokens_T[a:b] for a, b in zip(ends, starts)]
    return prompts, [batch.tokens_T[a:b] for a, b in zip(starts, ends[1:])]


def balance(
    lengths: Sequence[int] | np.ndarray | Tensor,
    *,
    token_budget: int,
    ranks: int = 1,
    round_to: int = 1,
    costs: Sequence[int] | np.ndarray | Tensor | None = None,
) -> Plan:
    """Shares sequences out over data-parallel ranks and micro-batches of at most `token_budget` tokens.

    Every rank gets the same number of micro-batches, a multiple of `round_to` and as few as the placement finds; their
    sizes are then evened out. The result depends on the arguments only.

    Args:
        lengths: N lengths in tokens, each from 1 to `token_budget`.
        token_budget: most tokens in one micro-batch. An alignment tail added by `pack` is not part of it: leave room.
        ranks: data-parallel size.
        round_to: micro-batches per rank are a multiple of this (the pipeline size under virtual pipeline parallelism).
        costs: N integers to even out instead of the lengths, for example with attention's quadratic share. The budget
            is still about tokens.

    Raises:
        ValueError: a sequence is longer than the budget (its index and length are named), a length or option is below
            1, a cost is negative, a sum does not fit in int64, or `lengths` and `costs` differ in size.
    """
    length_array = _row("lengths", lengths)
    cost_array = None if costs is None else _row("costs", costs)
    token_budget, ranks = _integer("token_budget", token_budget), _integer("ranks", ranks)
    round_to = _integer("round_to", round_to)
    n, order, offsets, tokens = _C.balance(length_array, cost_array, token_budget, ranks, round_to)
    flat, ends = order.tolist(), offsets.tolist()
    bins = [tuple(flat[a:b]) for a, b in pairwise(ends)]
    starts = range(0, ranks * n, n)
    return Plan(
        assignments=tuple(tuple(bins[k : k + n]) for k in starts),
        tokens=tuple(tuple(tokens[k : k + n].tolist()) for k in starts),
        token_budget=token_budget,
    )


def _integer(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int64, got {value}")
    return int(value)


def _row(name: str, row, kinds: str = "iu") -> np.ndarray:
    """One sequence of integers as an int64 array (a copy unless it is one already)."""
    if isinstance(row, Tensor):
        if row.is_floating_point() or row.is_complex():
            raise ValueError(f"{name}: expected integers, got {row.dtype}")
        array = row.detach().cpu().numpy()
    else:
        try:
            array = np.asarray(row)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{name}: expected a sequence of integers, got {type(row).__name__} ({error})") from None
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {array.shape} from {type(row).__name__}")
    if array.size == 0 and not isinstance(row, (np.ndarray, Tensor)):
        array = array.astype(np.int64)  # numpy calls an empty list float64
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name}: expected int64 values, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _flatten(name: str, rows: Sequence, kinds: str = "iu") -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows -> int64 values end to end, and N + 1 int64 offsets. The values never alias the caller's arrays."""
    try:
        rows = list(rows)
    except TypeError:
        raise ValueError(f"{name}: expected a sequence of token sequences, got {type(rows).__name__}") from None
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    if not rows:
        return np.zeros(0, dtype=np.int64), offsets
    if all(type(row) is list for row in rows):
        flat = _flat_list(list(chain.from_iterable(rows)), kinds)
        if flat is not None:
            np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=offsets[1:])
            return flat, offsets
    arrays = [_row(f"{name}[{i}]", row, kinds) for i, row in enumerate(rows)]
    np.cumsum([array.size for array in arrays], out=offsets[1:])
    return np.concatenate(arrays), offsets


def _flat_list(values: list, kinds: str) -> np.ndarray | None:
    """Python integers as int64, at one go; None when a value is unfit, and the slow path then finds and names it."""
    try:
        flat = np.array(values) if values else np.zeros(0, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        return None
    return flat.astype(np.int64, copy=False) if flat.ndim == 1 and flat.dtype.kind in kinds else None
