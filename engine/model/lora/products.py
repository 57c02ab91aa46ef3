"""The low-rank products beside one of Megatron's parallel linear layers.

A linear layer may compute several projections in one product. Their A are stacked in one parameter, so that x A^T is
one product too; `fused_B` places every B at its projection's rows of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

# Legend: T, rows of a packed stream; I, inputs and O, outputs of the linear layer on this rank; R, ranks of all stacked
# projections.


class LowRankProduct(nn.Module):
    """The adapter of one linear layer: y + scale * (x A^T) B^T.

    Args:
        config: Megatron's TransformerConfig.
        rank: of each projection.
        scale: of the product.
        inputs: inputs of the linear layer on this rank.
        groups: how often the rows of all projections alternate in the output on this rank.
        rows: rows of each projection within a group, of all projections of the layer in their order.
        parts: the projections that have an adapter.
    """

    # The tensor-parallel dimension of A and of every B; None: replicated.
    partition_of_A: int | None = None
    partition_of_B: int | None = None

    def __init__(
        self,
        config,
        rank: int,
        scale: float,
        inputs: int,
        groups: int,
        rows: Mapping[str, int],
        parts: Sequence[str],
    ) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.rank, self.scale, self.groups, self.rows, self.parts = rank, scale, groups, dict(rows), tuple(parts)
        dtype = config.params_dtype
        self.lora_A = nn.Parameter(torch.empty(len(parts) * rank, inputs, dtype=dtype))
        self._mark(self.lora_A, self.partition_of_A)
        for part in parts:
            weight = nn.Parameter(torch.empty(groups * rows[part], rank, dtype=dtype))
            self._mark(weight, self.partition_of_B)
            self.register_parameter(f"lora_B_{part}", weight)

    def _mark(self, weight: nn.Parameter, dim: int | None) -> None:
        if dim is not None:
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
        else:
            # Under sequence parallelism each rank has the gradient of its own rows: Megatron adds them up.
            weight.sequence_parallel = self.sequence_parallel

    def _reduce(self, u: Tensor) -> Tensor:
        """Make x A^T [T', 1, R] complete, for the rows that this rank multiplies by B."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the adapter's product.

        Args:
            x: input of the linear layer, [T, 1, I] ([T / TP, 1, I] where sequence parallelism shards it).
            y: its output, [T, 1, O] ([T / TP, 1, O]).
        """
        u = self._reduce(F.linear(x, self.lora_A))
        return torch.addmm(y.flatten(0, 1), u.flatten(0, 1), self.fused_B().t(), alpha=self.scale).view_as(y)

    def fused_B(self) -> Tensor:
        """Return B for the stacked x A^T, [O, R]: every projection's block, and zeros. A single one's B itself."""
        if len(self.rows) == 1:
            return self.get_parameter(f"lora_B_{self.parts[0]}")
        width = len(self.parts) * self.rank
        blocks = []
        for part, rows in self.rows.items():
            if part in self.parts:
                before = self.parts.index(part) * self.rank
                block = self.get_parameter(f"lora_B_{part}").view(self.groups, rows, self.rank)
                blocks.append(F.pad(block, (before, width - self.rank - before)))
            else:
                blocks.append(self.lora_A.new_zeros(self.groups, rows, width))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the entries for Megatron's dist_checkpointing, each with its true tensor-parallel sharding.

        Megatron 0.16: the default of a plain module counts every parameter as replicated -> all shards but the first
        would be lost without an error.
        """
        dims = {"lora_A": self.partition_of_A} | {f"lora_B_{part}": self.partition_of_B for part in self.parts}
        sharded = {name: dim for name, dim in dims.items() if dim is not None}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, sharded, sharded_offsets)


class ColumnLowRankProduct(LowRankProduct):
    """Beside a column-parallel layer: A is replicated, every B is sharded by rows as its projection is."""

    partition_of_B = 0

    def _reduce(self, u: Tensor) -> Tensor:
        # Every rank multiplies all rows by its own B: the gradient of x A^T is the sum over ranks.
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(u)
        return copy_to_tensor_model_parallel_region(u)


class RowLowRankProduct(LowRankProduct):
    """Beside a row-parallel layer: A is sharded by columns as the layer's input is, B is replicated."""

    partition_of_A = 1

    def _reduce(self, u: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(u)
        return reduce_from_tensor_model_parallel_region(u)
