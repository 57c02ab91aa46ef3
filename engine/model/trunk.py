"""The trunk of every role: embedding, Megatron's TransformerBlock, final norm; a packed stream in, hidden states out.

Megatron 0.16: GPTModel drops the final norm, or allocates a vocabulary-sized output layer for the critic too -> the
trunk is assembled here. Positions come with the stream, so rope is computed by row and no layer synchronises.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
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
from icegrt.model.attention import AttentionMetadata
from icegrt.model.layer import RMSNorm, layer_spec, rope_table


def _mark_sharded_weights(trunk: nn.Module) -> None:
    # Megatron 0.16: weights are marked as tensor-parallel only when Megatron initialises them -> the gradient norm
    # would count ours on the first tensor-parallel rank alone. We mark them.
    for module in trunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


class Trunk(LanguageModule):
    """One pipeline stage of a decoder: [T] int64 tokens and positions -> [T, 1, H] hidden states.

    Args:
        architecture: sizes and family of the model.
        config: Megatron's TransformerConfig of the architecture and layout.
        padded_vocab_size: rows of the embedding over all tensor-parallel ranks.
        pre_process: whether the stage embeds tokens (the first stage).
        post_process: whether the stage applies the final norm (the last stage).
        vp_stage: index of the virtual pipeline stage on this rank; None without virtual stages.
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
        _mark_sharded_weights(self)
        frequencies = architecture.rope.inverse_frequencies(architecture.head_dim)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def set_input_tensor(self, input_tensor) -> None:
        """Set the previous stage's hidden states as input of the next forward pass. Megatron's schedules call it."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Return hidden states, [T, 1, H] in Megatron's layout ([T / TP, 1, H] under sequence parallelism).

        The last stage has applied the final norm.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])
            # torch's matmul selects its kernel by strides and by whether the weight needs a gradient: with the strides
            # of the transposed stream, the frozen reference and the actor differ in their last bits. We normalise them.
            hidden = hidden.flatten(0, 1).unsqueeze(1)
            if self.config.recompute_granularity == "full" and not hidden.requires_grad:
                # A recomputed layer has a backward pass only if its input needs a gradient. That of a frozen embedding
                # does not, and the adapters of the layer would get none.
                hidden.requires_grad_(torch.is_grad_enabled())
        rope = rope_table(positions_T, self.inverse_frequencies)
        return self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rope, packed_seq_params=metadata)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the stage's entries for Megatron's dist_checkpointing.

        Megatron 0.16: LanguageModule's own method expects an `output_layer` -> we call its base class.
        """
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
