"""A trunk with its head: the module behind every role."""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core import parallel_state
from torch import Tensor

from icegrt.kernels import VocabShard
from icegrt.model.architecture import Architecture
from icegrt.model.attention import AttentionPlan
from icegrt.model.heads import LMHead, ScalarHead
from icegrt.model.trunk import Trunk
from icegrt.packing import PackedBatch

HeadKind = Literal["lm", "scalar"]


class LanguageModel(Trunk):
    """Trunk and head in one module (a Trunk by inheritance, so that Megatron finds embedding, decoder and ties).

    `head` is an `LMHead` (actor, reference; absent when the embedding is tied) or a `ScalarHead` (reward, critic).
    """

    def __init__(self, architecture: Architecture, config, head: HeadKind) -> None:
        super().__init__(
            architecture,
            config,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        self.architecture = architecture
        self.head_kind = head
        if self.post_process and head == "scalar":
            self.head = ScalarHead(config)
        elif self.post_process and not architecture.tied_embeddings:
            rows = architecture.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
            self.head = LMHead(config, rows)

    @property
    def lm_weight_VH(self) -> Tensor:
        """The weight that makes logits, [V / TP, H]: the LM head's, or the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.embedding.word_embeddings.weight
        return self.head.weight

    @property
    def vocab_shard(self) -> VocabShard | None:
        """This rank's slice of the vocabulary; None where there is nothing to combine."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if ranks == 1:
            return None
        size = self.architecture.vocab_size // ranks
        rank = parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        return VocabShard(group, rank * size, size, self.architecture.vocab_size)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states of a packed batch, [T, 1, H]."""
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
        return self(batch.tokens_T, batch.positions_T, AttentionPlan(lengths=lengths))

    @torch.no_grad()
    def logits_NV(self, hidden_NH: Tensor) -> Tensor:
        """Float32 logits of a few rows, for sampling. [N, H] -> [N, V / TP]."""
        return torch.nn.functional.linear(hidden_NH.float(), self.lm_weight_VH.float())
