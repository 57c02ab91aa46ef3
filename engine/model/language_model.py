"""A trunk with its head: the module behind every role."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import check_model
from icegrt.kernels import VocabShard
from icegrt.model.architecture import Architecture
from icegrt.model.attention import AttentionPlan
from icegrt.model.heads import LMHead, ScalarHead
from icegrt.model.trunk import Trunk
from icegrt.packing import PackedBatch

HeadKind = Literal["lm", "scalar"]
_EMBEDDING = "embedding.word_embeddings.weight"


class LanguageModel(Trunk):
    """Trunk and head in one module (a Trunk by inheritance, so that Megatron finds embedding, decoder and ties).

    `head` is an `LMHead` (actor, reference; absent where a tied embedding is at hand) or a `ScalarHead` (reward,
    critic). Cut over ranks (`assemble`), this is what one rank holds. Of several virtual stages the last one stands for
    them all: `chunks` lists them in the order of the forward pass.
    """

    def __init__(self, architecture: Architecture, config, head: HeadKind, vp_stage: int | None = None) -> None:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rows = architecture.padded_vocab_size(ranks) // ranks
        stage = {} if vp_stage is None else {"ignore_virtual": False, "vp_stage": vp_stage}
        super().__init__(
            architecture,
            config,
            rows * ranks,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        self.head_kind = head
        self.vocab_rows = rows
        self.chunks: list[LanguageModel] = [self]
        self.share_embeddings_and_output_weights = architecture.tied_embeddings and head == "lm"
        if self.post_process and head == "scalar":
            self.head = ScalarHead(config)
        elif self.post_process and not (self.share_embeddings_and_output_weights and self.pre_process):
            self.head = LMHead(config, rows)
        if self.share_embeddings_and_output_weights and not (self.pre_process and self.post_process):
            self._tie_across_stages()

    def _tie_across_stages(self) -> None:
        # The first and the last stage hold a copy each. Megatron adds their gradients up, keeps their optimizer states
        # alike, and counts the second one (`shared`) in no norm.
        weight = self.shared_embedding_or_output_weight()
        if weight is not None:
            weight.shared_embedding = True
            weight.shared = not self.pre_process

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight as this stage has it (Megatron asks by this name)."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.head.weight if self.post_process else None

    @property
    def holds_tied_copy(self) -> bool:
        """Whether the head is a second copy of the embedding, which an earlier stage has."""
        return self.share_embeddings_and_output_weights and self.post_process and not self.pre_process

    @property
    def lm_weight_VH(self) -> Tensor:
        """The weight that makes logits, [V / TP, H]: the LM head's, or the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.embedding.word_embeddings.weight
        # Called, not read: where gathering parameters overlaps with the forward pass, the call waits for this one.
        return self.head()

    def settle(self) -> None:
        """Parameters may still be on their way after an optimizer step (a role that learns says how to wait): to be
        called before they are read other than by a forward pass."""

    def scale_head(self, factor: float) -> None:
        """Multiply a scalar head's every output from now on; a no-op on the stages that have no head."""
        if self.post_process:
            self.head.scale_by(factor)

    @property
    def vocab_shard(self) -> VocabShard | None:
        """This rank's slice of the vocabulary; None where there is nothing to combine."""
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return None
        rank = parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        return VocabShard(group, rank * self.vocab_rows, self.vocab_rows, self.architecture.vocab_size)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states of a packed batch, [T, 1, H] ([T / TP, 1, H] under sequence parallelism)."""
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
        return self(batch.tokens_T, batch.positions_T, AttentionPlan(lengths=lengths))

    def rows_of(self, hidden_T1H: Tensor) -> Tensor:
        """What `hidden` gave on the last stage as whole rows, [T, H]. Heads give the gradient of every row whole."""
        if self.config.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=False)
        return hidden_T1H.squeeze(1)

    @torch.no_grad()
    def logits_NV(self, hidden_NH: Tensor) -> Tensor:
        """Float32 logits of a few rows, for sampling. [N, H] -> [N, V / TP]."""
        return nn.functional.linear(hidden_NH.float(), self.lm_weight_VH.float())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """For Megatron's dist_checkpointing: as the trunk's; a tied copy is saved once, under the embedding's name."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.holds_tied_copy:
            state[f"{prefix}head.weight"] = make_tp_sharded_tensor_for_checkpoint(
                self.head.weight,
                f"{prefix}{_EMBEDDING}",
                replica_id=(1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
                allow_shape_mismatch=True,
            )
        return state


def check_cut(architecture: Architecture) -> None:
    """Raises `ConfigError` where the layout of the open cluster cannot cut such a model; costs nothing."""
    cluster = Cluster.current()
    check_model(
        cluster.layout,
        cluster.world_size,
        layers=architecture.num_layers,
        heads=architecture.num_heads,
        kv_heads=architecture.num_kv_heads,
        ffn=architecture.ffn_size,
    )


def assemble(
    architecture: Architecture, head: HeadKind, *, dtype: torch.dtype, recompute: str = "none"
) -> LanguageModel:
    """What this rank holds of a model under the layout of the open cluster, with weights that are not set yet.

    Raises `ConfigError` where the architecture cannot be cut that way.
    """
    check_cut(architecture)
    cluster = Cluster.current()
    layout = cluster.layout
    config = architecture.transformer_config(dtype=dtype, layout=layout, recompute=recompute)
    stages = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else (None,)
    chunks = [LanguageModel(architecture, config, head, stage).to(cluster.device) for stage in stages]
    for index, layer in enumerate(layer for chunk in chunks for layer in chunk.decoder.layers):
        layer.self_attention.core_attention.layer = index
    for chunk in chunks:
        chunk.chunks = chunks
    return chunks[-1]


@contextlib.contextmanager
def whole_sequences(model: LanguageModel) -> Iterator[None]:
    """Sequence parallelism off while decoding: one token per sequence does not divide by the tensor-parallel size."""
    parts = [part for chunk in model.chunks for part in chunk.modules()] if model.config.sequence_parallel else []
    names = ("sequence_parallel", "reduce_scatter_embeddings")
    switched = [(x, name) for x in (*parts, model.config) for name in names if x.__dict__.get(name) is True]
    try:
        for place, name in switched:
            setattr(place, name, False)
        yield
    finally:
        for place, name in switched:
            setattr(place, name, True)
