"""From a padded [B, L] batch to the action stream: which rows predict an action, and where sequences begin."""

from __future__ import annotations

import torch
from torch import Tensor

from . import validate
from .dispatch import select
from .types import PaddedActions

# Legend: A, actions (tokens that the policy chose); N = B, sequences; B and L, extents of the padded batch.


def pack_padded(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> PaddedActions:
    """Return the action stream of a padded batch. Left and right padding, and gaps inside a response, may occur.

    The row of an action is the nearest attended token before it in its own sequence, whose hidden state predicts it.
    The linear kernels read `hidden.flatten(0, 1)[s.action_rows_A]`.

    Args:
        input_ids: [B, L] int32 or int64.
        attention_mask: [B, L], bool, integers, or floats of 0 and 1; 0 marks padding.
        response_mask: [B, L], bool, integers, or floats of 0 and 1; nonzero marks a token that the policy chose.

    Returns:
        PaddedActions over the A chosen tokens, sequence by sequence.

    Raises:
        TypeError: input_ids are not integers.
        ValueError: Shapes or devices differ, a response token is padding, or no attended token precedes it.
    """
    op = "pack_padded"
    validate.check_integral(op, "input_ids", input_ids, (None, None))
    validate.check_mask(op, "attention_mask", attention_mask, tuple(input_ids.shape), input_ids)
    validate.check_mask(op, "response_mask", response_mask, tuple(input_ids.shape), input_ids)
    return select(op, input_ids)(input_ids, attention_mask != 0, response_mask != 0)


def pack_rows(input_ids: Tensor, attended_BL: Tensor, chosen_BL: Tensor) -> PaddedActions:
    """Return the action stream in plain PyTorch; see the public function."""
    # 1. For each token, the nearest attended token before it.
    B, L = input_ids.shape
    column = torch.arange(L, device=input_ids.device).expand(B, L)
    # Column of the latest attended token up to and including each column, -1 before the first.
    latest = torch.where(attended_BL, column, -1).cummax(dim=1).values if L else column
    before = torch.cat([latest.new_full((B, min(1, L)), -1), latest[:, :-1]], dim=1)
    _raise_where(chosen_BL & ~attended_BL, "response_mask marks padding (attention_mask is 0 there)")
    _raise_where(
        chosen_BL & (before < 0), "response_mask marks a token with no attended token before it; expected a prompt"
    )
    # 2. Rows of the flat batch, sequence by sequence.
    first_row = torch.arange(B, device=input_ids.device)[:, None] * L
    token_rows_A = chosen_BL.flatten().nonzero().squeeze(1)
    lengths = torch.cat([chosen_BL.new_zeros(1, dtype=torch.int64), chosen_BL.sum(1)])
    return PaddedActions(
        action_rows_A=(first_row + before).flatten()[token_rows_A],
        action_tokens_A=input_ids.flatten()[token_rows_A].long(),
        token_rows_A=token_rows_A,
        cu_actions=lengths.cumsum(0).to(torch.int32),
        last_rows_N=first_row.squeeze(1) + (latest[:, -1].clamp(min=0) if L else 0),
        shape=(B, L),
    )


def _raise_where(bad_BL: Tensor, message: str) -> None:
    if bad_BL.any():
        row, column = (int(i) for i in bad_BL.nonzero()[0])
        raise ValueError(f"pack_padded: {message}, first at [{row}, {column}]")
