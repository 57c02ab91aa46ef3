"""What the backends of paged_attention take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SPLIT = 256  # tokens of a part of a sequence; as in csrc/paged_attention.hpp


@dataclass(frozen=True)
class Pages:
    """A paged cache, and where the tokens of each sequence are.

    Attributes:
        keys_BGKD, values_BGKD: [B, G, K, D], blocks contiguous.
        tables: [rows, W] int32, blocks of a sequence in order; rows contiguous.
        table_rows_S: [S] int32, the row of each sequence; None: its index.
    """

    keys_BGKD: Tensor
    values_BGKD: Tensor
    tables: Tensor
    table_rows_S: Tensor | None

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys_BGKD.shape[2]

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.keys_BGKD.shape[1]


@dataclass(frozen=True)
class Rows:
    """Which tokens the rows attend to.

    Attributes:
        lengths_S: [S] int32, tokens that the last row of each sequence attends to.
        starts: [S + 1] int32, first row of each sequence; None: one row each.
        max_length: at least the largest length.
        window: tokens that a row attends to, its own included; 0: all.
    """

    lengths_S: Tensor
    starts: Tensor | None
    max_length: int
    window: int
