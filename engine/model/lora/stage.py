"""One pipeline stage of an adapted model: the adapter's parameters and the role's head, over a stage of the trunk.

The stage of the trunk is no submodule: Megatron's DDP, optimizer and checkpoints see the adapter and the head alone.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from icegrt.kernels import VocabShard
from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.heads import ScalarHead
from icegrt.model.language_model import LanguageModel
from icegrt.model.lora.products import ColumnLowRankProduct, LowRankProduct, RowLowRankProduct
from icegrt.model.lora.spec import LINEARS, ROW_PARALLEL, AdapterSpec
from icegrt.packing import PackedBatch


class LayerAdapter(nn.Module):
    """The adapter of one layer; submodules have the names of the layer's linear modules.

    Attributes:
        layer_number: of the layer in the whole model, from 1.
        products: by the names in `LINEARS`.
    """

    def __init__(self, spec: AdapterSpec, architecture: Architecture, config, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.products: dict[str, LowRankProduct] = {}
        for linear in LINEARS:
            if spec.parts(linear):
                product = self.products[linear] = _product(spec, architecture, config, linear)
                owner, _, name = linear.partition(".")
                self.get_submodule(owner).add_module(name, product)


def _product(spec: AdapterSpec, architecture: Architecture, config, linear: str) -> LowRankProduct:
    a, ranks = architecture, config.tensor_model_parallel_size
    parts = spec.parts(linear)
    if linear in ROW_PARALLEL:
        inputs = (a.ffn_size if linear.startswith("mlp") else a.num_heads * a.head_dim) // ranks
        return RowLowRankProduct(config, spec.rank, spec.scale, inputs, 1, {parts[0]: a.hidden_size}, parts)
    if linear.startswith("mlp"):
        groups, rows = 1, dict.fromkeys(LINEARS[linear], a.ffn_size // ranks)
    else:
        # Megatron stores the query heads of a group next to their shared key and value.
        queries = a.num_heads // a.num_kv_heads * a.head_dim
        groups, rows = a.num_kv_heads // ranks, {"q_proj": queries, "k_proj": a.head_dim, "v_proj": a.head_dim}
    return ColumnLowRankProduct(config, spec.rank, spec.scale, a.hidden_size, groups, rows, parts)


class StageAdapter(nn.Module):
    """The adapter of the layers of one stage."""

    def __init__(self, spec: AdapterSpec, trunk: LanguageModel) -> None:
        super().__init__()
        self.num_layers = trunk.architecture.num_layers
        self.layers = nn.ModuleList(
            LayerAdapter(spec, trunk.architecture, trunk.config, layer.layer_number) for layer in trunk.decoder.layers
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the entries for dist_checkpointing; layers are stacked along a leading dimension, as Megatron's."""
        state = {}
        for index, layer in enumerate(self.layers):
            offsets = [(0, layer.layer_number - 1, self.num_layers)]
            for linear, product in layer.products.items():
                local = f"{prefix}layers.{index}.{linear}."
                entries = product.sharded_state_dict(local, offsets, metadata)
                for name, entry in entries.items():
                    entry.key = f"{prefix}layers.{linear}.{name.removeprefix(local)}"
                state |= entries
        return state


class AdaptedStage(nn.Module):
    """An adapter and a head over one stage of a trunk. It offers what `PipelineModel` and Megatron's schedules call.

    `decoder` is the adapter: its layers have the names and numbers of the trunk's.

    Args:
        trunk: a stage with frozen parameters.
        spec: of the adapter.
        head: 'lm': the trunk's output projection; 'scalar': a head of this model, or the trunk's own scalar head.
    """

    share_embeddings_and_output_weights = False  # frozen: no gradients of copies to add up
    holds_tied_copy = False
    trunk: LanguageModel

    def __init__(self, trunk: LanguageModel, spec: AdapterSpec, head: HeadKind) -> None:
        super().__init__()
        object.__setattr__(self, "trunk", trunk)  # as an attribute of a module it would be registered
        trunk.adapters.attach(trunk.decoder.layers)
        self.head_kind = head
        self.decoder = StageAdapter(spec, trunk)
        if self.post_process and head == "scalar":
            self.head = trunk.head if trunk.head_kind == "scalar" else ScalarHead(trunk.config)

    # -- what the trunk decides ------------------------------------------------------------------------------------

    @property
    def architecture(self) -> Architecture:
        """Sizes and family of the whole model."""
        return self.trunk.architecture

    @property
    def config(self) -> Any:
        """Megatron's TransformerConfig."""
        return self.trunk.config

    @property
    def pre_process(self) -> bool:
        """Whether the stage embeds tokens."""
        return self.trunk.pre_process

    @property
    def post_process(self) -> bool:
        """Whether the stage has the final norm and the head."""
        return self.trunk.post_process

    @property
    def vp_stage(self) -> int | None:
        """Index of the virtual pipeline stage on this rank; None without virtual stages."""
        return self.trunk.vp_stage

    @property
    def model_type(self) -> Any:
        """Megatron's kind of model."""
        return self.trunk.model_type

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary on this rank."""
        return self.trunk.vocab_rows

    @property
    def vocab_limit(self) -> int:
        """The number of ids that count; of the trunk, so of all models on it."""
        return self.trunk.vocab_limit

    @vocab_limit.setter
    def vocab_limit(self, size: int) -> None:
        self.trunk.vocab_limit = size

    @property
    def vocab_shard(self) -> VocabShard | None:
        """This rank's slice of the vocabulary."""
        return self.trunk.vocab_shard

    @property
    def lm_weight_VH(self) -> Tensor:
        """The trunk's output projection, [V / TP, H]."""
        return self.trunk.lm_weight_VH

    def lm_weight_and_grad(self) -> tuple[Tensor, Tensor | None]:
        """Return the trunk's output projection, and no buffer: it is frozen."""
        return self.trunk.lm_weight_and_grad()

    # -- passes ----------------------------------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the previous stage's hidden states. Megatron's schedules call it."""
        self.trunk.set_input_tensor(input_tensor)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states of a packed batch under the adapter, as `LanguageModel.hidden` does."""
        if self.trunk.training != self.training:  # it decides about recomputation
            self.trunk.train(self.training)
        return self.trunk.hidden(batch, self.decoder)

    def gather_hidden_rows(self, hidden_T1H: Tensor) -> Tensor:
        """Return the last stage's hidden states as complete rows, [T, H], on every tensor-parallel rank."""
        return self.trunk.gather_hidden_rows(hidden_T1H)

    @torch.no_grad()
    def scale_head(self, factor: float) -> None:
        """Multiply all later outputs of a scalar head by `factor`. A stage without a head does nothing."""
        if self.post_process:
            self.head.scale_by(factor)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the entries of adapter and head for Megatron's dist_checkpointing."""
        state = self.decoder.sharded_state_dict(f"{prefix}decoder.", sharded_offsets, metadata)
        if self.post_process and self.head_kind == "scalar":
            head = self.head.state_dict(prefix="", keep_vars=True)
            state |= make_sharded_tensors_for_checkpoint(head, f"{prefix}head.", {}, sharded_offsets)
        return state
