"""Paged attention in plain PyTorch: the tokens of a sequence are gathered, and its rows attend to them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validate import wide_dtype
from .inputs import Pages, Rows


def paged_attention(q_TND: Tensor, pages: Pages, rows: Rows, scale: float, out: Tensor) -> None:
    """Write the attention of rows; see the public function."""
    lengths = rows.lengths_S.tolist()
    starts = range(len(lengths) + 1) if rows.starts is None else rows.starts.tolist()
    table_rows = range(len(lengths)) if pages.table_rows_S is None else pages.table_rows_S.tolist()
    blocks = pages.keys_BGKD.shape[0]
    for s, length in enumerate(lengths):
        if not 0 <= starts[s] <= starts[s + 1] <= q_TND.shape[0]:
            raise ValueError(f"row_starts must not decrease and lie within the {q_TND.shape[0]} rows")
        if length > rows.max_length:
            raise ValueError(f"lengths_S must be at most max_length {rows.max_length}, got {length} at sequence {s}")
        table = pages.tables[table_rows[s], : -(-max(0, length) // pages.block_size)].long()
        if ((table < 0) | (table >= blocks)).any():
            raise ValueError(f"block_tables must name one of the {blocks} blocks, got {table.tolist()}")
        attended = _attend(q_TND[starts[s] : starts[s + 1]], pages, table, length, rows.window, scale)
        out[starts[s] : starts[s + 1]] = attended


def _attend(q_RND: Tensor, pages: Pages, table: Tensor, length: int, window: int, scale: float) -> Tensor:
    # Legend: R, rows of the sequence; L, its tokens; M, queries of a key/value head.
    dtype = wide_dtype(q_RND)
    k_LGD, v_LGD = (
        cache[table].transpose(1, 2).flatten(0, 1)[:length].to(dtype) for cache in (pages.keys_BGKD, pages.values_BGKD)
    )
    q_RGMD = q_RND.unflatten(1, (pages.groups, -1)).to(dtype)
    scores = torch.einsum("rgmd,lgd->rgml", q_RGMD, k_LGD) * scale
    ends = length - torch.arange(q_RND.shape[0] - 1, -1, -1, device=q_RND.device)[:, None]
    token = torch.arange(max(0, length), device=q_RND.device)
    visible = token < ends
    if window:
        visible &= token >= ends - window
    probs = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    # A row without tokens is 0.
    probs = probs.masked_fill(ends[:, None, None] <= 0, 0.0)
    return torch.einsum("rgml,lgd->rgmd", probs, v_LGD).flatten(1, 2).to(q_RND.dtype)
