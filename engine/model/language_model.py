"""A trunk with its head: one pipeline stage of a model, as a module that Megatron-core schedules.

Imports Megatron-core, so `build.py` imports this module only after `Cluster.open()` has loaded it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from icegrt.kernels import VocabShard
from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.attention import AttentionMetadata
from icegrt.model.heads import AddedToMainGrad, LMHead, ScalarHead
from icegrt.model.hf.mapping import EMBEDDING
from icegrt.model.lora.selection import AdapterSelection
from icegrt.model.shared_prompts import PromptGroups
from icegrt.model.trunk import Trunk
from icegrt.packing import PackedBatch

if TYPE_CHECKING:
    from icegrt.model.lora.stage import StageAdapter


class LanguageModel(Trunk):
    """Trunk and head of one pipeline stage (a Trunk by inheritance, so that Megatron finds embedding and decoder).

    `head` is an `LMHead` (actor, reference) or a `ScalarHead` (reward model, critic) on the last stage. A stage that
    holds a tied embedding has no `LMHead`. `PipelineModel` owns the stages of a rank.

    Args:
        architecture: sizes and family of the model.
        config: Megatron's TransformerConfig of the architecture and layout.
        head: 'lm' or 'scalar'.
        vp_stage: index of the virtual pipeline stage on this rank; None without virtual stages.
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
        self.adapters = AdapterSelection()
        self.vocab_rows = rows
        self.vocab_limit = architecture.vocab_size
        self.share_embeddings_and_output_weights = architecture.tied_embeddings and head == "lm"
        if self.post_process and head == "scalar":
            self.head = ScalarHead(config)
        elif self.post_process and not (self.share_embeddings_and_output_weights and self.pre_process):
            self.head = LMHead(config, rows)
        if self.share_embeddings_and_output_weights and not (self.pre_process and self.post_process):
            self._tie_across_stages()

    def _tie_across_stages(self) -> None:
        # The first and the last stage hold a copy each. Megatron adds their gradients up, keeps their optimizer states
        # equal, and leaves the second copy (`shared`) out of every gradient norm.
        weight = self.shared_embedding_or_output_weight()
        if weight is not None:
            weight.shared_embedding = True
            weight.shared = not self.pre_process

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return this stage's copy of the tied weight; None on a middle stage. Megatron calls it by this name."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.head.weight if self.post_process else None

    @property
    def holds_tied_copy(self) -> bool:
        """Whether the head is a second copy of the embedding of an earlier stage."""
        return self.share_embeddings_and_output_weights and self.post_process and not self.pre_process

    @property
    def lm_weight_VH(self) -> Tensor:
        """The output projection, [V / TP, H]: the LM head's weight, or the embedding's if they are tied."""
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.embedding.word_embeddings.weight
        # A call, not an attribute: DDP's forward hook waits for an overlapped parameter all-gather of this weight.
        return self.head()

    def lm_weight_and_grad(self) -> tuple[Tensor, Tensor | None]:
        """Return the output projection for a loss, and the fp32 buffer [V / TP, H] that its backward adds dW to.

        Autograd would round dW to the weight's dtype in every micro-batch. None: the weight is fp32, or no backward
        follows.
        """
        weight = self.lm_weight_VH
        buffer = getattr(weight, "main_grad", None) if torch.is_grad_enabled() and weight.requires_grad else None
        if buffer is None or buffer.dtype == weight.dtype:
            return weight, None
        if self.share_embeddings_and_output_weights and self.pre_process:
            # DDP's hook still has to add the embedding's part, so the parameter must not be marked.
            return weight.detach().requires_grad_(), buffer
        return AddedToMainGrad.apply(weight), buffer

    def scale_head(self, factor: float) -> None:
        """Multiply all later outputs of a scalar head by `factor`. A stage without a head does nothing."""
        if self.post_process:
            self.head.scale_by(factor)

    @property
    def vocab_shard(self) -> VocabShard | None:
        """This rank's slice of the vocabulary; None if this rank holds all of it and every id counts."""
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            is_limited = self.vocab_limit < self.architecture.vocab_size
            return VocabShard(None, 0, self.vocab_rows, self.vocab_limit) if is_limited else None
        rank = parallel_state.get_tensor_model_parallel_rank()
        group = parallel_state.get_tensor_model_parallel_group()
        return VocabShard(group, rank * self.vocab_rows, self.vocab_rows, self.vocab_limit)

    def hidden(self, batch: PackedBatch, adapter: StageAdapter | None = None) -> Tensor:
        """Return the hidden states of a packed batch, [T, 1, H] ([T / TP, 1, H] under sequence parallelism).

        Args:
            batch: on the device.
            adapter: of this stage; None: the trunk alone. A backward pass must come before the forward pass with
                another adapter.
        """
        self.adapters.selected = adapter
        groups = None
        if batch.group_sizes:
            groups = PromptGroups(batch.lengths, batch.group_sizes, batch.cu_seqlens, batch.cu_groups)
        metadata = AttentionMetadata(lengths=batch.lengths, cu_seqlens=batch.cu_seqlens, groups=groups)
        return self(batch.tokens_T, batch.positions_T, metadata)

    def gather_hidden_rows(self, hidden_T1H: Tensor) -> Tensor:
        """Return the last stage's `hidden` output as complete rows, [T, H], on every tensor-parallel rank.

        Under sequence parallelism this is an all-gather. Its backward pass takes this rank's slice of the gradient:
        heads already give the complete gradient of every row.
        """
        if self.config.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=False)
        return hidden_T1H.squeeze(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the stage's entries for Megatron's dist_checkpointing.

        A tied copy is saved once, under the embedding's name.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.holds_tied_copy:
            state[f"{prefix}head.weight"] = make_tp_sharded_tensor_for_checkpoint(
                self.head.weight,
                f"{prefix}{EMBEDDING}",
                replica_id=(1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True)),
                allow_shape_mismatch=True,
            )
        return state
