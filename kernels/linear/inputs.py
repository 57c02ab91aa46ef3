"""Inputs of the linear operations, and what their backends exchange about a chunk of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..common.vocab_rows import RowStats, TokenGrads
from ..ppo_policy_loss.inputs import PolicyObjective, PolicyStreams
from ..types import PPOLoss, VocabShard
from ..validate import (
    IGNORED_LABEL,
    check_floating,
    check_integral,
    check_labels_in_range,
    check_mask,
    check_plain_number,
    check_shard,
    wide_dtype,
)

if TYPE_CHECKING:
    from .products import ChunkedHead

# Legend
#   A  actions of the packed stream        H  width of the hidden states
#   R  rows that the mask keeps            V  rows of the weight, padding included
#   C  rows of a chunk                     v  rows of the weight that are vocabulary
#   L  rows of a chunk with a gradient


@dataclass(frozen=True)
class HeadInputs:
    """Arguments that both linear operations share: what becomes logits, and how."""

    hidden_AH: Tensor
    weight_VH: Tensor
    labels_A: Tensor
    mask_A: Tensor | None  # 0: ignore the row; None: ignore none
    temperature: float
    shard: VocabShard | None
    chunk_rows: int | None  # None: a default that depends on V and the device
    weight_grad_out: Tensor | None  # [V, H] buffer that backward adds dW to; None: autograd gets dW
    rows_R: Tensor | slice | None = None  # the rows that count, if the host knows them; slice(None): all
    drop_inactive: bool = True  # on a device: leave rows without a gradient out of the backward's products


class LogitsChunk(NamedTuple):
    """One chunk of logits between the product that makes them and the products of the backward."""

    rows: slice  # of the R rows
    hidden: Tensor  # [C, H] as the product reads it
    labels: Tensor  # [C]
    logits: Tensor  # [C, v], as `ChunkOps.row_stats` leaves them
    local: RowStats | None  # of this rank's columns; None if logits_grad needs none
    merged: RowStats  # of the full rows


class ChunkOps(NamedTuple):
    """What happens to a chunk of logits between the products. Instances: TORCH_OPS, CPP_OPS and TRITON_OPS."""

    # (head, logits, labels) -> statistics of this rank's columns. May overwrite the logits.
    row_stats: Callable[[ChunkedHead, Tensor, Tensor], RowStats]
    # (head, logits, labels) -> what logits_grad needs when the merged statistics are known and the logits are new.
    recompute_stats: Callable[[ChunkedHead, Tensor, Tensor], RowStats | None]
    # (head, chunk, gradients [C] by log-prob and entropy, active [L] or None) -> (dz [L, v] in the product's dtype, a
    # factor [L] that each row still lacks or None). May overwrite the logits.
    logits_grad: Callable[[ChunkedHead, LogitsChunk, TokenGrads, Tensor | None], tuple[Tensor, Tensor | None]]
    # (log-prob, entropy, streams, objective) -> gradients of the unnormalized objective by token.
    token_grads: Callable[[Tensor, Tensor | None, PolicyStreams, PolicyObjective], TokenGrads]
    # (log-prob, entropy, streams, objective, normalizer) -> loss and statistics.
    policy_loss: Callable[[Tensor, Tensor | None, PolicyStreams, PolicyObjective, float | Tensor], PPOLoss]


def check_head_inputs(op: str, head: HeadInputs) -> None:
    """Raise TypeError or ValueError for the first invalid argument that both linear operations share."""
    hidden_AH, weight_VH, labels_A = head.hidden_AH, head.weight_VH, head.labels_A
    # 1. Operands of the product. Autocast is the caller's consent to mixed dtypes.
    check_floating(op, "hidden_AH", hidden_AH, (None, None))
    check_floating(op, "weight_VH", weight_VH, (None, hidden_AH.shape[1]), hidden_AH)
    if hidden_AH.dtype != weight_VH.dtype and not torch.is_autocast_enabled(hidden_AH.device.type):
        raise TypeError(
            f"{op}: hidden_AH and weight_VH must have one dtype (or run under autocast), got {hidden_AH.dtype} and "
            f"{weight_VH.dtype}"
        )
    # 2. Rows and options.
    check_integral(op, "labels_A", labels_A, (hidden_AH.shape[0],), hidden_AH)
    check_mask(op, "mask_A", head.mask_A, (hidden_AH.shape[0],), hidden_AH)
    check_plain_number(op, "temperature", head.temperature, low=0.0, above=True)
    check_shard(op, head.shard, weight_VH.shape[0])
    if weight_VH.shape[0] == 0:
        raise ValueError(f"{op}: weight_VH must have at least one row, got shape {tuple(weight_VH.shape)}")
    chunk_rows = head.chunk_rows
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"{op}: chunk_rows must be an int >= 1 or None, got {chunk_rows!r}")
    _check_rows(op, head)
    # 3. The gradient buffer: dW is summed in the wide dtype, and a narrower buffer would round every addition.
    buffer = head.weight_grad_out
    if buffer is not None:
        check_floating(op, "weight_grad_out", buffer, tuple(weight_VH.shape), weight_VH)
        wanted = wide_dtype(hidden_AH, weight_VH)
        if buffer.dtype != wanted or buffer.requires_grad:
            raise ValueError(
                f"{op}: weight_grad_out must be a {wanted} buffer that requires no gradient, got "
                f"{buffer.dtype} with requires_grad={buffer.requires_grad}"
            )
        if not (torch.is_grad_enabled() and weight_VH.requires_grad):
            raise ValueError(
                f"{op}: weight_grad_out must be None where no backward can follow (no_grad, or a weight that requires "
                "no gradient): nothing would be added to it"
            )
    # 4. Labels, of unmasked rows only.
    vocab_size = weight_VH.shape[0] if head.shard is None else head.shard.vocab_size
    masked_A = labels_A if head.mask_A is None else torch.where(head.mask_A != 0, labels_A, IGNORED_LABEL)
    check_labels_in_range(op, masked_A, vocab_size)


def _check_rows(op: str, head: HeadInputs) -> None:
    """Raise if rows_R is no index, or on a CPU if it differs from the rows that mask and labels keep."""
    rows_R, labels_A = head.rows_R, head.labels_A
    if rows_R is None:
        return
    if isinstance(rows_R, slice):
        if rows_R != slice(None):
            raise ValueError(f"{op}: rows_R must be an index tensor, slice(None) or None, got {rows_R}")
    else:
        check_integral(op, "rows_R", rows_R, (None,), labels_A)
    if labels_A.device.type == "cpu":
        keep_A = labels_A != IGNORED_LABEL
        keep_A = keep_A if head.mask_A is None else keep_A & (head.mask_A != 0)
        listed_A = torch.zeros_like(keep_A)
        listed_A[rows_R] = True
        if not torch.equal(listed_A, keep_A):
            row = int((listed_A != keep_A).nonzero()[0])
            raise ValueError(f"{op}: rows_R must be the rows that mask_A and labels_A keep; they differ at row {row}")
