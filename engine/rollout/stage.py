"""A pipeline stage's forward pass over the rows of a step, without a module's call: prompts and decode rows alike.

Every result goes to a static buffer, so a step allocates nothing, and a CUDA graph may replay it. The arithmetic is
that of the layers in `icegrt.model.layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.kernels import add_rms_norm, decode_linear, paged_attention, rms_norm, rope_write_kv, swiglu
from icegrt.rollout.weights import LayerWeights, LowRankWeights, NormWeight, StageWeights

# Legend: T, rows; S, sequences; H, hidden size; B, blocks; G, key/value heads; K, tokens of a block; D, elements of a
# head; R = D / 2.


@dataclass(frozen=True)
class StepRows:
    """How the rows of a step are placed and attend, on the device; the plan's arrays.

    Attributes:
        tokens_T, positions_T, cache_slots_T: int32; a slot below 0 is padding.
        lengths_S, table_rows_S: int32, of the sequences.
        row_starts: [S + 1] int32; None: every sequence has one row.
        block_tables: [slots, W] int32.
        max_length: an integer that no length exceeds.
    """

    tokens_T: Tensor
    positions_T: Tensor
    cache_slots_T: Tensor
    lengths_S: Tensor
    table_rows_S: Tensor
    row_starts: Tensor | None
    block_tables: Tensor
    max_length: int


@dataclass(frozen=True)
class StageShape:
    """Sizes of a stage on this rank.

    Attributes:
        hidden_size: elements of a row of the residual stream.
        heads, kv_heads, head_dim: of attention.
        mlp_width: elements between the two products of an MLP.
        group: the tensor-parallel ranks; None: this rank has whole layers.
        vocab_start: id of the first row of the embedding.
        adapter_width: most columns of x A^T of an adapter; 0: none.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    group: dist.ProcessGroup | None
    vocab_start: int = 0
    adapter_width: int = 0


class Activations:
    """The static buffers of a forward pass, of up to `rows` rows. Stages and micro-batches of a rank share them.

    Attributes:
        residual, normed: [rows, H]; residual is the stream that layers add to, normed what they read.
    """

    def __init__(self, shape: StageShape, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows, *size, dtype=dtype, device=device)

        width = shape.heads * shape.head_dim
        group = shape.heads // shape.kv_heads + 2
        self.residual = empty(shape.hidden_size)
        self.normed = empty(shape.hidden_size)
        self.delta = empty(shape.hidden_size)
        self.qkv = empty(shape.kv_heads * group * shape.head_dim)
        self.queries = empty(shape.heads, shape.head_dim)
        self.attended = empty(shape.heads, shape.head_dim)
        self.flat_attended = self.attended.view(rows, width)
        self.qkv_heads = self.qkv.view(rows, shape.kv_heads, group, shape.head_dim)
        self.gate_up = empty(2 * shape.mlp_width)
        self.gated = empty(shape.mlp_width)
        self.low_rank = empty(shape.adapter_width)
        self.position = empty(1, dtype=torch.float32)
        self.angles = empty(shape.head_dim // 2, dtype=torch.float32)
        self.cos = empty(shape.head_dim // 2, dtype=torch.float32)
        self.sin = empty(shape.head_dim // 2, dtype=torch.float32)
        self.local_token = empty(dtype=torch.int32)
        self.is_local = empty(1, dtype=torch.bool)
        self.is_below = empty(1, dtype=torch.bool)

    def rows(self, count: int) -> Activations:
        """Return views of the first `count` rows of every buffer."""
        part = object.__new__(Activations)
        part.__dict__.update({name: buffer[:count] for name, buffer in vars(self).items()})
        return part


class DecodeStage:
    """Runs steps through one pipeline stage.

    Args:
        weights: the stage's parameters.
        shape: its sizes.
        keys, values: [B, G, K, D] by layer, the blocks of the cache.
    """

    def __init__(
        self, weights: StageWeights, shape: StageShape, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        self.weights, self.shape = weights, shape
        self.keys, self.values = keys, values

    def forward(self, step: StepRows, x: Activations) -> None:
        """Run a step's rows. The caller has put the stage's input into `x.residual`, unless the stage embeds tokens.

        The last stage leaves its normed hidden states in `x.normed`, another one its output in `x.residual`.

        Args:
            step: the rows.
            x: buffers of as many rows.
        """
        self._rotation(step, x)
        if self.weights.embedding is not None:
            self._embed(self.weights.embedding, step.tokens_T, x)
        layers = self.weights.layers
        _norm(layers[0].input_norm, x.residual, x.normed)
        for index, layer in enumerate(layers):
            # 1. Attention reads `normed`; its result is added to the residual stream and normed for the MLP.
            self._attend(layer, index, step, x)
            _add_and_norm(layer.mlp_norm, x)
            # 2. The MLP's result is added and normed for the next layer: additions and norms are one pass.
            decode_linear(x.normed, layer.gate_up, out=x.gate_up)
            _add_low_rank(layer.gate_up_adapter, x.normed, x.gate_up, x)
            swiglu(x.gate_up, out=x.gated)
            decode_linear(x.gated, layer.down, out=x.delta)
            _add_low_rank(layer.down_adapter, x.gated, x.delta, x)
            self._reduce(x.delta)
            following = layers[index + 1].input_norm if index + 1 < len(layers) else self.weights.final_norm
            if following is not None:
                _add_and_norm(following, x)
            else:
                x.residual.add_(x.delta)

    def _rotation(self, step: StepRows, x: Activations) -> None:
        # As `rope_table`, to the bit.
        x.position.copy_(step.positions_T[:, None])
        torch.mul(x.position, self.weights.inverse_frequencies, out=x.angles)
        torch.cos(x.angles, out=x.cos)
        torch.sin(x.angles, out=x.sin)

    def _embed(self, embedding: Tensor, tokens_T: Tensor, x: Activations) -> None:
        if self.shape.group is None:
            torch.index_select(embedding, 0, tokens_T, out=x.residual)
            return
        # Ids of other ranks read a row of this one, which is then multiplied by 0; the sum over ranks has all of them.
        torch.sub(tokens_T, self.shape.vocab_start, out=x.local_token)
        torch.ge(x.local_token[:, None], 0, out=x.is_local)
        torch.lt(x.local_token[:, None], embedding.shape[0], out=x.is_below)
        x.is_local.logical_and_(x.is_below)
        x.local_token.clamp_(0, embedding.shape[0] - 1)
        torch.index_select(embedding, 0, x.local_token, out=x.residual)
        x.residual.mul_(x.is_local)
        self._reduce(x.residual)

    def _attend(self, layer: LayerWeights, index: int, step: StepRows, x: Activations) -> None:
        decode_linear(x.normed, layer.qkv, layer.qkv_bias, out=x.qkv)
        _add_low_rank(layer.qkv_adapter, x.normed, x.qkv, x)
        if layer.q_norm is not None and layer.k_norm is not None:
            _norm(layer.q_norm, x.qkv_heads[:, :, :-2], x.qkv_heads[:, :, :-2])
            _norm(layer.k_norm, x.qkv_heads[:, :, -2], x.qkv_heads[:, :, -2])
        keys, values = self.keys[index], self.values[index]
        rope_write_kv(x.qkv_heads, x.cos, x.sin, keys, values, step.cache_slots_T, out=x.queries)
        paged_attention(
            x.queries,
            keys,
            values,
            step.block_tables,
            step.lengths_S,
            row_starts=step.row_starts,
            table_rows_S=step.table_rows_S,
            max_length=step.max_length,
            window=layer.window,
            out=x.attended,
        )
        decode_linear(x.flat_attended, layer.projection, out=x.delta)
        _add_low_rank(layer.projection_adapter, x.flat_attended, x.delta, x)
        self._reduce(x.delta)
        if layer.projection_bias is not None:
            x.delta.add_(layer.projection_bias)

    def _reduce(self, x: Tensor) -> None:
        if self.shape.group is not None:
            dist.all_reduce(x, group=self.shape.group)


def _norm(norm: NormWeight, x: Tensor, out: Tensor) -> None:
    rms_norm(x, norm.weight, eps=norm.eps, out=out)


def _add_and_norm(norm: NormWeight, x: Activations) -> None:
    """Add `delta` to the residual stream, and write its norm to `normed`."""
    add_rms_norm(x.delta, x.residual, norm.weight, eps=norm.eps, out=x.normed, sum_out=x.residual)


def _add_low_rank(adapter: LowRankWeights | None, rows: Tensor, out: Tensor, x: Activations) -> None:
    """Add an adapter's product to that of the trunk.

    Beside a row-parallel product both are this rank's part of a sum, which one reduction completes.
    """
    if adapter is not None:
        low_rank = x.low_rank[:, : adapter.a.shape[1]]
        torch.mm(rows, adapter.a, out=low_rank)
        out.addmm_(low_rank, adapter.b, alpha=adapter.scale)
