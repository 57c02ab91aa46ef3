"""From a Hugging Face configuration to what Megatron-core builds: one `Architecture`, one table row per family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icegrt.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Family:
    """What distinguishes a family of checkpoints: its names in Hugging Face and the parts its layers have."""

    model_type: str
    causal_lm: str
    sequence_classifier: str
    qkv_bias: bool = False
    qk_norm: bool = False


# One row per family; tensor names are those of `weights.py`, which Llama's descendants share.
FAMILIES = {
    family.model_type: family for family in (Family("llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),)
}


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: sizes, rope and head sharing, as its checkpoint states them."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    hf_config: dict[str, Any]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Architecture:
        """Read `config.json` of `folder`. Raises `CheckpointError` for what is missing or not supported."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: no config.json; expected a folder with a Hugging Face checkpoint")
        try:
            return cls.from_config(json.loads(path.read_text(encoding="utf-8")), where=str(path))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from None

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config") -> Architecture:
        """Check a Hugging Face configuration (as a dict) and take over what it says."""

        def need(name: str):
            if config.get(name) is None:
                raise CheckpointError(f"{where}: `{name}` is missing")
            return config[name]

        family = FAMILIES.get(str(config.get("model_type")))
        if family is None:
            raise CheckpointError(
                f"{where}: model_type {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        _refuse_unsupported(config, where)
        heads = need("num_attention_heads")
        return cls(
            family=family,
            num_layers=need("num_hidden_layers"),
            hidden_size=need("hidden_size"),
            ffn_size=need("intermediate_size"),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or need("hidden_size") // heads,
            vocab_size=need("vocab_size"),
            context_length=need("max_position_embeddings"),
            norm_eps=need("rms_norm_eps"),
            rope_theta=_rope_theta(config, where),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            hf_config=dict(config),
        )

    def transformer_config(self, *, dtype: torch.dtype, tensor: int = 1, pipeline: int = 1):
        """Megatron's TransformerConfig of this architecture (local layers, no fused CUDA-only parts)."""
        from megatron.core.transformer import TransformerConfig

        return TransformerConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_size,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_kv_heads,
            kv_channels=self.head_dim,
            layernorm_epsilon=self.norm_eps,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=self.family.qkv_bias,
            qk_layernorm=self.family.qk_norm,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            # Every parameter is loaded from a checkpoint, and a missing one is an error.
            perform_initialization=False,
            use_cpu_initialization=not torch.cuda.is_available(),
            calculate_per_token_loss=True,
            variable_seq_lengths=True,
            # Megatron wants this for variable lengths even where there are no experts.
            moe_token_dispatcher_type="alltoall",
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            persist_layer_norm=False,
            deallocate_pipeline_outputs=False,
        )


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantised weights are not supported; export the checkpoint in fp32 or bf16")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise CheckpointError(f"{where}: `{name}` is true, which this family's layers do not have yet")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{where}: hidden_act {activation!r} is not supported; expected 'silu'")


def _rope_theta(config: dict[str, Any], where: str) -> float:
    # transformers 5 writes `rope_parameters`; earlier versions wrote `rope_theta` and `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported yet; supported: 'default'")
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
