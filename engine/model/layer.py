"""The layer of a trunk: Megatron's modules with icegrt's fused operations between their matrix products.

Megatron 0.16: without Transformer Engine its layer runs norm, residual, rope and activation as some 60 small PyTorch
operations, and forms cosines and sines again in every layer and tensor -> the forward passes of the layer and of
self-attention are written here, on Megatron's own submodules. Parameters, names and checkpoints stay Megatron's.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from icegrt.kernels import add_rms_norm, rms_norm, rope, rope_qkv, swiglu
from icegrt.model.architecture import Architecture
from icegrt.model.attention import AttentionMetadata, PackedAttention


class RMSNorm(nn.Module):
    """Root-mean-square norm, y = x / sqrt(mean(x^2) + eps) * weight.

    Megatron 0.16: the local norm rejects sequence parallelism -> this one marks its weight, so that Megatron sums the
    weight's gradient over tensor-parallel ranks.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the norm of x; with a residual (norm of x + residual, x + residual)."""
        if residual is None:
            return rms_norm(x, self.weight, eps=self.eps)
        return add_rms_norm(x, residual, self.weight, eps=self.eps)


class BiasedProjection(RowParallelLinear):
    """Attention's output projection with a bias.

    Megatron 0.16: one switch gives attention and MLP a bias -> this layer has a bias of its own.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **(kwargs | {"bias": True}))


class PackedSelfAttention(SelfAttention):
    """Self-attention over a packed stream; the fused projection is split and rotated in one pass."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: AttentionMetadata,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the projected attention [T, 1, H] and its bias.

        Args:
            hidden_states: normed hidden states, [T, 1, H] ([T / TP, 1, H] under sequence parallelism).
            rotary_pos_emb: `rope_table` of the stream, [2, T, head_dim / 2].
            packed_seq_params: how the rows of the stream attend.
        """
        # 1. Groups of the fused projection: the queries of a group, its key and its value.
        qkv, _ = self.linear_qkv(hidden_states)
        width = self.hidden_size_per_attention_head
        qkv_TGMD = qkv.view(qkv.shape[0], self.num_query_groups_per_partition, -1, width)
        cos_TR, sin_TR = rotary_pos_emb.unbind()
        # 2. Rotate. A norm by head comes before the rotation, and reads the heads in place.
        if self.q_layernorm is None:
            q_TND, k_TGD, v_TGD = rope_qkv(qkv_TGMD, cos_TR, sin_TR)
        else:
            q, k, v = qkv_TGMD.split([qkv_TGMD.shape[2] - 2, 1, 1], dim=2)
            q, k = self.q_layernorm(q).flatten(1, 2), self.k_layernorm(k).flatten(1, 2)
            q_TND, k_TGD = rope(q, k, cos_TR, sin_TR)
            v_TGD = v.squeeze(2)
        # 3. Attend and project.
        heads = [x.unsqueeze(1) for x in (q_TND, k_TGD, v_TGD)]
        recompute = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recompute else self.core_attention
        return self.linear_proj(attend(*heads, None, packed_seq_params=packed_seq_params))


class Layer(TransformerLayer):
    """A pre-norm layer: attention and MLP, each added to the residual stream."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: AttentionMetadata,
        **unused,
    ) -> tuple[Tensor, None]:
        """Return the hidden states after the layer, [T, 1, H], and no context."""
        normed = self.input_layernorm(hidden_states)
        attended, bias = self.self_attention(normed, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params)
        if bias is not None:
            attended = attended + bias
        normed, hidden_states = self.pre_mlp_layernorm(attended, hidden_states)
        gated, _ = self.mlp(normed)
        return hidden_states + gated, None


def layer_spec(config, architecture: Architecture):
    """Return Megatron's local layer specification with icegrt's layer, attention, norms and activation."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.module = Layer
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.self_attention.module = PackedSelfAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    # Megatron 0.16: an MLP that reads its width from the configuration warns. The spec passes it.
    layer.mlp.params = {"ffn_hidden_size": config.ffn_hidden_size}
    layer.mlp.submodules.activation_func = swiglu
    attention.core_attention = PackedAttention
    if architecture.projection_bias:
        attention.linear_proj = BiasedProjection
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def rope_table(positions_T: Tensor, inverse_frequencies_R: Tensor) -> Tensor:
    """Return cosines and sines of the angles of a stream, [2, T, R] fp32, which all layers share."""
    angles_TR = torch.outer(positions_T.float(), inverse_frequencies_R)
    table = torch.empty((2, *angles_TR.shape), dtype=angles_TR.dtype, device=angles_TR.device)
    torch.cos(angles_TR, out=table[0])
    torch.sin(angles_TR, out=table[1])
    return table
