"""The storage of a paged KV cache: blocks of keys and values of all layers that a rank holds."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt.rollout.stage import StageShape


class PagedCache:
    """Blocks of keys and values, [2 layers, blocks, kv_heads, block_size, head_dim] in one storage.

    Blocks hold whatever memory held: attention reads written tokens alone.

    Args:
        layers: number of layers that this rank holds.
        n_blocks: blocks.
        block_size: tokens of a block.
        shape: sizes of the stage.
        dtype: of keys and values.
        device: of keys and values.
    """

    def __init__(
        self,
        layers: int,
        n_blocks: int,
        block_size: int,
        shape: StageShape,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size = (2 * layers, n_blocks, shape.kv_heads, block_size, shape.head_dim)
        self.blocks = torch.empty(size, dtype=dtype, device=device)
        self.layers = layers

    def part(self, first: int, count: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return `count` blocks from `first` on: those of all layers, then keys and values by layer."""
        part = self.blocks[:, first : first + count]
        return (
            part,
            [part[2 * layer] for layer in range(self.layers)],
            [part[2 * layer + 1] for layer in range(self.layers)],
        )


def block_bytes(layers: int, block_size: int, shape: StageShape, dtype: torch.dtype) -> int:
    """Return the bytes of a block over all layers of this rank."""
    return 2 * layers * shape.kv_heads * block_size * shape.head_dim * dtype.itemsize
