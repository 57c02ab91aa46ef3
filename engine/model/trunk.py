"""The trunk every role stands on: embedding, Megatron's TransformerBlock, final norm; packed streams in, hidden out.

Not Megatron's GPTModel, which either drops the final norm or allocates a vocabulary-sized output layer for the critic
too. Positions come with the stream, so the rope table is gathered by row and no layer has to synchronise.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor, nn

from icegrt.model.architecture import Architecture
from icegrt.model.attention import AttentionMetadata, PackedAttention


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight knows about sequence parallelism (Megatron's local one refuses it)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class BiasedProjection(RowParallelLinear):
    """Attention's output projection with a bias, for which Megatron has no switch but the MLP's."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **(kwargs | {"bias": True}))


def layer_spec(config, architecture: Architecture):
    """Megatron's local layer with icegrt's norm and packed attention in it."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    # Megatron 0.16: an MLP that reads its width from the configuration warns. The spec passes it.
    layer.mlp.params = {"ffn_hidden_size": config.ffn_hidden_size}
    attention.core_attention = PackedAttention
    if architecture.projection_bias:
        attention.linear_proj = BiasedProjection
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _mark_cut_parameters(trunk: nn.Module) -> None:
    # Megatron marks biases always, but weights only where it initialises them, which it does not do here. The norm of
    # the gradients counts a parameter without the mark on the first tensor-parallel rank only.
    for module in trunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            rows = not isinstance(module, RowParallelLinear)
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=0 if rows else 1, stride=1)


class Trunk(LanguageModule):
    """Token stream to hidden states: [T] int64 tokens and positions -> [T, H].

    A rank of a pipeline holds one such stage, or one per virtual stage (`vp_stage`): the first embeds (`pre_process`),
    the last applies the final norm (`post_process`). `padded_vocab_size`: rows of the embedding over all ranks.
    """

    def __init__(
        self,
        architecture: Architecture,
        config,
        padded_vocab_size: int,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab_size,
                max_sequence_length=architecture.context_length,
                position_embedding_type="rope",
                tp_group=self.pg_collection.tp,
            )
        layers = [layer_spec(config, architecture)] * get_num_layers_to_build(config, vp_stage=vp_stage)
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        _mark_cut_parameters(self)
        frequencies = architecture.rope.inverse_frequencies(architecture.head_dim)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def set_input_tensor(self, input_tensor) -> None:
        """Megatron's schedules hand over the previous stage's hidden states here."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, plan: AttentionMetadata) -> Tensor:
        """Returns [T, 1, H] (Megatron's layout; T / TP under sequence parallelism): final on the last stage only."""
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])
            # The transposed stream has odd strides in its dimension of one, for which matmul chooses another kernel
            # where the weight is frozen: reference and actor would differ in their last bits.
            hidden = hidden.flatten(0, 1).unsqueeze(1)
        angles = torch.outer(positions_T.float(), self.inverse_frequencies)
        rope = torch.cat((angles, angles), dim=-1)[:, None, None, :]
        return self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rope, packed_seq_params=plan)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """For Megatron's dist_checkpointing. LanguageModule's own expects an `output_layer`, which no trunk has."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
