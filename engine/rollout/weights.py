"""The parameters of a pipeline stage, in place: views that a decoder multiplies by without a module's call.

The views are Megatron's own parameters, so an optimizer step or a loaded checkpoint changes what a decoder reads. An
adapter's B of fused projections is the exception: it is placed in a matrix of its own, which `refresh` fills again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from icegrt.model.language_model import LanguageModel
    from icegrt.model.lora.products import LowRankProduct
    from icegrt.model.lora.stage import AdaptedStage, LayerAdapter


@dataclass(frozen=True)
class NormWeight:
    """A root-mean-square norm: its weight, [H] or [head_dim], and the number that its square root adds."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> NormWeight | None:
        """Return the weight of an `RMSNorm`; None: there is no norm."""
        return None if getattr(module, "weight", None) is None else cls(module.weight.detach(), module.eps)


@dataclass(frozen=True)
class LowRankWeights:
    """An adapter's product x A^T B^T scale, of all projections that one product of the trunk computes.

    It is not merged with the trunk's weight. A merged weight would need a copy of the trunk, and would be rounded to
    its dtype: the rollout would sample from another policy than the one that is trained.

    Attributes:
        a: [in, R], the projections' A, transposed view.
        b: [R, out], the projections' B at the columns of the product, transposed view.
        scale: of the product.
        product: the module whose parameters they are.
    """

    a: Tensor
    b: Tensor
    scale: float
    product: LowRankProduct

    @classmethod
    def of(cls, adapter: LayerAdapter | None, linear: str) -> LowRankWeights | None:
        """Return the adapter of a linear layer, by its name in `LINEARS`; None: it has none."""
        product = None if adapter is None else adapter.products.get(linear)
        if product is None:
            return None
        return cls(product.lora_A.detach().t(), product.fused_B().detach().t(), product.scale, product)

    def refresh(self) -> None:
        """Read B again, after a change of the weights; a single projection's is read in place."""
        if len(self.product.rows) > 1:
            self.b.copy_(self.product.fused_B().detach().t())


@dataclass(frozen=True)
class LayerWeights:
    """The parameters of a layer, this rank's tensor-parallel slice of them.

    Attributes:
        input_norm, mlp_norm: norms before attention and before the MLP.
        qkv: [(heads + 2 kv_heads) head_dim, H], rows ordered by group: its queries, its key, its value.
        qkv_bias: its bias, or None.
        q_norm, k_norm: norms by head before the rotation, or None.
        projection: [H, heads head_dim], attention's output projection; `projection_bias`: its bias, or None.
        gate_up: [2 F, H]; `down`: [H, F].
        window: tokens that a token attends to, itself included; None: all.
        qkv_adapter, projection_adapter, gate_up_adapter, down_adapter: what is added to the products; None: nothing.
    """

    input_norm: NormWeight
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: NormWeight | None
    k_norm: NormWeight | None
    projection: Tensor
    projection_bias: Tensor | None
    mlp_norm: NormWeight
    gate_up: Tensor
    down: Tensor
    window: int | None
    qkv_adapter: LowRankWeights | None = None
    projection_adapter: LowRankWeights | None = None
    gate_up_adapter: LowRankWeights | None = None
    down_adapter: LowRankWeights | None = None

    @classmethod
    def of(cls, layer: Any, adapter: LayerAdapter | None = None) -> LayerWeights:
        """Return the parameters of a layer of `icegrt.model.layer`, and of its adapter."""
        attention, mlp = layer.self_attention, layer.mlp
        input_norm, mlp_norm = NormWeight.of(layer.input_layernorm), NormWeight.of(layer.pre_mlp_layernorm)
        assert input_norm is not None and mlp_norm is not None
        return cls(
            input_norm,
            attention.linear_qkv.weight.detach(),
            _detached(attention.linear_qkv.bias),
            NormWeight.of(attention.q_layernorm),
            NormWeight.of(attention.k_layernorm),
            attention.linear_proj.weight.detach(),
            _detached(attention.linear_proj.bias),
            mlp_norm,
            mlp.linear_fc1.weight.detach(),
            mlp.linear_fc2.weight.detach(),
            attention.core_attention.window,
            LowRankWeights.of(adapter, "self_attention.linear_qkv"),
            LowRankWeights.of(adapter, "self_attention.linear_proj"),
            LowRankWeights.of(adapter, "mlp.linear_fc1"),
            LowRankWeights.of(adapter, "mlp.linear_fc2"),
        )

    @property
    def adapters(self) -> list[LowRankWeights]:
        """The adapters of the layer's products."""
        adapters = (self.qkv_adapter, self.projection_adapter, self.gate_up_adapter, self.down_adapter)
        return [adapter for adapter in adapters if adapter is not None]


@dataclass(frozen=True)
class StageWeights:
    """The parameters of a pipeline stage.

    Attributes:
        embedding: [V / TP, H] of the first stage, else None.
        layers: in the order of the forward pass.
        final_norm: of the last stage, else None.
        head: [V / TP, H], the output projection of the last stage, else None.
        inverse_frequencies: [head_dim / 2] fp32, of the rotation.
    """

    embedding: Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm: NormWeight | None
    head: Tensor | None
    inverse_frequencies: Tensor

    @classmethod
    def of(cls, stage: LanguageModel | AdaptedStage) -> StageWeights:
        """Return the parameters of a stage: those of a trunk, with an adapter or without."""
        trunk: Any = getattr(stage, "trunk", stage)
        adapters = [None] * len(trunk.decoder.layers) if trunk is stage else stage.decoder.layers
        return cls(
            trunk.embedding.word_embeddings.weight.detach() if trunk.pre_process else None,
            tuple(LayerWeights.of(*pair) for pair in zip(trunk.decoder.layers, adapters, strict=True)),
            NormWeight.of(trunk.decoder.final_layernorm) if trunk.post_process else None,
            trunk.lm_weight_VH.detach() if trunk.post_process else None,
            trunk.inverse_frequencies,
        )

    def refresh(self) -> None:
        """Read again what is no view of a parameter, after a change of the weights."""
        for layer in self.layers:
            for adapter in layer.adapters:
                adapter.refresh()

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses that change if offloading has moved the parameters."""
        first = self.layers[0]
        return tuple(x.data_ptr() for x in (first.qkv, *(adapter.a for adapter in first.adapters)))


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
