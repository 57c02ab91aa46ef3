"""Paged attention on CPU threads (csrc/paged_attention.hpp): one pass over keys and values, fp32 inside for halves."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, hold
from ..dispatch import log_launch
from .inputs import Pages, Rows


def paged_attention(q_TND: Tensor, pages: Pages, rows: Rows, scale: float, out: Tensor) -> None:
    """Write the attention of rows; see the public function."""
    log_launch("paged_attention", "cpp")
    keys, values = pages.keys_BGKD, pages.values_BGKD
    blocks, groups, block_size, width = keys.shape
    _C.paged_attention(
        str(q_TND.dtype).removeprefix("torch."),
        tuple(
            map(address, (q_TND, out, keys, values, pages.tables, rows.lengths_S, pages.table_rows_S, rows.starts)),
        ),
        (*q_TND.stride()[:2], *out.stride()[:2], keys.stride(0), values.stride(0), pages.tables.stride(0)),
        (
            q_TND.shape[0],
            rows.lengths_S.shape[0],
            q_TND.shape[1],
            groups,
            width,
            blocks,
            block_size,
            pages.tables.shape[0],
            rows.window,
        ),
        scale,
        rows.max_length,
        torch.get_num_threads(),
    )
    hold(q_TND, out, keys, values, pages.tables, rows.lengths_S, pages.table_rows_S, rows.starts)
