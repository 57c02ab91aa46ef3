"""A trunk with its head: the module behind every role."""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from icegrt.kernels import VocabShard
from icegrt.model.architecture import Architecture
from icegrt.model.attention import AttentionMetadata
from icegrt.model.heads import LMHead, ScalarHead
from icegrt.model.trunk import Trunk
from icegrt.packing import PackedBatch

HeadKind = Literal["lm", "scalar"]
_EMBEDDING = "embedding.word_embeddings.weight"


class LanguageModel(Trunk):
    """Trunk and head in one module (a Trunk by inheritance, so that Megatron finds embedding, decoder and ties).

    `head` is an `LMHead` (actor, reference; absent where a tied embedding is at hand) or a `ScalarHead` (reward,
    critic). In a parallel layout (`build_parallel_model`) an instance holds one rank's part. Of several virtual stages
    the last one stands for them all: `chunks` lists them in the order of the forward pass.
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

    def wait_for_param_gather(self) -> None:
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
        return self(batch.tokens_T, batch.positions_T, AttentionMetadata(lengths=lengths))

    def gather_hidden_rows(self, hidden_T1H: Tensor) -> Tensor:
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
