"""The parameters of a pipeline stage, in place: views that a decoder multiplies by without a module's call.

The views are Megatron's own parameters, so an optimizer step or a loaded checkpoint changes what a decoder reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from icegrt.model.language_model import LanguageModel


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

    @classmethod
    def of(cls, layer: Any) -> LayerWeights:
        """Return the parameters of a layer of `icegrt.model.layer`."""
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
        )


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
    def of(cls, stage: LanguageModel) -> StageWeights:
        """Return the parameters of a stage."""
        return cls(
            stage.embedding.word_embeddings.weight.detach() if stage.pre_process else None,
            tuple(LayerWeights.of(layer) for layer in stage.decoder.layers),
            NormWeight.of(stage.decoder.final_layernorm) if stage.post_process else None,
            stage.lm_weight_VH.detach() if stage.post_process else None,
            stage.inverse_frequencies,
        )


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
