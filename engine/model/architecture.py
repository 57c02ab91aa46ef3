"""Read a Hugging Face configuration into one `Architecture` for all families, and convert it for Megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from icegrt.distributed.layout import Layout
from icegrt.errors import CheckpointError
from icegrt.model.families import FAMILIES, Family, family_of, refuse_unsupported
from icegrt.model.rope import Rope
from icegrt.utils.files import read_object

__all__ = ["DTYPES", "FAMILIES", "Architecture", "HeadKind"]

HeadKind = Literal["lm", "scalar"]
# Limits of sizes for which memory is allocated before any tensor is checked.
_LARGEST = {"num_hidden_layers": 10_000}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer as its checkpoint describes it: sizes, rope, windows, tied embeddings.

    Attributes:
        window: how many tokens a layer of `windowed_layers` attends to, the current one included; None if no layer has
            a window shorter than the context.
        windowed_layers: one flag per layer.
        hf_config: the checkpoint's `config.json`.
        generation_config: the checkpoint's `generation_config.json`, written to exports.
    """

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
    rope: Rope
    window: int | None
    windowed_layers: tuple[bool, ...]
    tied_embeddings: bool
    qkv_bias: bool
    projection_bias: bool
    hf_config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Architecture:
        """Read `config.json` and the optional `generation_config.json` of a folder.

        Raises:
            CheckpointError: a file or key is missing, invalid or not supported.
        """
        path = Path(folder) / "config.json"
        if path.with_name("adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: an adapter, not a model. Name the merged model instead: `model` in the folder of the run "
                "that trained it, or what `merge_and_unload` of peft gives"
            )
        if not path.is_file():
            raise CheckpointError(f"{folder}: no config.json; expected a folder with a Hugging Face checkpoint")
        generation = path.with_name("generation_config.json")
        settings = read_object(generation) if generation.is_file() else {}
        return cls.from_config(read_object(path), where=str(path), generation_config=settings)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], where: str = "config", generation_config: dict[str, Any] | None = None
    ) -> Architecture:
        """Check a Hugging Face configuration and read it.

        Args:
            config: content of `config.json`.
            where: its name in error messages.
            generation_config: content of `generation_config.json`.

        Raises:
            CheckpointError: a key is missing, invalid or not supported.
        """
        # 1. The family, with its defaults.
        family = family_of(config, where)
        refuse_unsupported(family, config, where)
        with_defaults = {**family.defaults, **config}
        sizes = _Sizes(with_defaults, where)
        # 2. Heads and their size.
        heads, hidden = sizes.need("num_attention_heads"), sizes.need("hidden_size")
        kv_heads = sizes.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise CheckpointError(
                f"{where}: `num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {kv_heads}"
            )
        head_dim = sizes.get("head_dim")
        if head_dim is None and hidden % heads:
            raise CheckpointError(
                f"{where}: `hidden_size` {hidden} is not a multiple of `num_attention_heads` {heads}, and no "
                "`head_dim` is given"
            )
        head_dim = head_dim or hidden // heads
        if head_dim % 2:
            raise CheckpointError(f"{where}: heads of {head_dim} dimensions cannot be rotated in pairs; expected even")
        # 3. Layers, windows, biases, vocabulary.
        layers, context = sizes.need("num_hidden_layers"), sizes.need("max_position_embeddings")
        window, windowed = _windows(family, with_defaults, sizes, layers, context)
        attention_bias = family.optional_bias and _flag(config, "attention_bias", where)
        vocab_size = sizes.need("vocab_size")
        _check_token_ids(config, vocab_size, where)
        return cls(
            family=family,
            num_layers=layers,
            hidden_size=hidden,
            ffn_size=sizes.need("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            context_length=context,
            norm_eps=_epsilon(config, where),
            rope=Rope.from_config(config, where),
            window=window,
            windowed_layers=windowed,
            tied_embeddings=_flag(config, "tie_word_embeddings", where),
            qkv_bias=family.qkv_bias or attention_bias,
            projection_bias=attention_bias,
            hf_config=dict(config),
            generation_config=dict(generation_config or {}),
        )

    def padded_vocab_size(self, ranks: int) -> int:
        """Return the rows of the embedding over all tensor-parallel ranks: the vocabulary, padded to a multiple."""
        return -(-self.vocab_size // ranks) * ranks

    def transformer_config(self, *, dtype: torch.dtype, layout: Layout | None = None, recompute: str = "none"):
        """Return Megatron's TransformerConfig of this architecture, with local layers and no CUDA-only fusions.

        Args:
            dtype: of parameters.
            layout: the layout; None holds the whole model on one rank.
            recompute: activation recomputation, 'none', 'selective' or 'full'.
        """
        from megatron.core.transformer import TransformerConfig

        layout = layout or Layout()
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
            # Megatron 0.16: only this switch gives the activation the fused output of gate and up. The function is that
            # of the layer specification, icegrt's own.
            use_te_activation_func=True,
            add_bias_linear=False,
            add_qkv_bias=self.qkv_bias,
            qk_layernorm=self.family.qk_norm,
            window_size=(self.window - 1, 0) if self.window else None,
            window_attn_skip_freq=[*map(int, self.windowed_layers)],
            attention_dropout=0.0,
            hidden_dropout=0.0,
            tensor_model_parallel_size=layout.tensor,
            sequence_parallel=layout.sequence_parallel,
            **_pipeline_settings(layout),
            **_RECOMPUTE[recompute],
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            # Every parameter is loaded from a checkpoint.
            perform_initialization=False,
            use_cpu_initialization=not torch.cuda.is_available(),
            calculate_per_token_loss=True,
            variable_seq_lengths=True,
            # Megatron 0.16: rejects variable lengths with its default dispatcher, even in a model without experts.
            moe_token_dispatcher_type="alltoall",
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            persist_layer_norm=False,
            deallocate_pipeline_outputs=False,
            # Megatron 0.16: its own default, "full", is deprecated and warns. The empty list means the same.
            cuda_graph_scope=[],
        )


# 'full' keeps the input of each layer only.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _pipeline_settings(layout: Layout) -> dict[str, Any]:
    # Megatron 0.16: waits for the device after every batched message, against a race of old torch versions -> off.
    settings: dict[str, Any] = {"pipeline_model_parallel_size": layout.pipeline, "batch_p2p_sync": False}
    if layout.virtual_pipeline > 1:
        settings["virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline
        # Megatron 0.16: batched messages of two pipeline ranks reach the wrong micro-batch -> batching is off.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if layout.pipeline_split:
        stages = [["decoder"] * layers for layers in layout.pipeline_split]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        settings["pipeline_model_parallel_layout"] = stages
    return settings


@dataclass(frozen=True)
class _Sizes:
    """Reads positive integers of a configuration."""

    config: Mapping[str, Any]
    where: str

    def need(self, name: str) -> int:
        """Return a required key."""
        if self.config.get(name) is None:
            raise CheckpointError(f"{self.where}: `{name}` is missing")
        return self.get(name)

    def get(self, name: str) -> int | None:
        """Return an optional key; None if it is missing or null."""
        value = self.config.get(name)
        if value is None:
            return None
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{self.where}: `{name}` must be a whole number above 0, got {value!r}")
        if value > _LARGEST.get(name, 2**31 - 1):
            raise CheckpointError(f"{self.where}: `{name}` is {value}, more than any model has; copy the file again")
        return value


def _windows(
    family: Family, config: Mapping[str, Any], sizes: _Sizes, layers: int, context: int
) -> tuple[int | None, tuple[bool, ...]]:
    no_layer = (False,) * layers
    if family.windows == "none":
        return None, no_layer
    windowed = (True,) * layers if family.windows == "all_layers" else _windowed_layers(config, sizes, layers)
    # Qwen's configurations name a window even when `use_sliding_window` is false; then no layer may use it.
    switched_off = family.windows == "by_layer" and not _flag(config, "use_sliding_window", sizes.where)
    window = None if switched_off else sizes.get("sliding_window")
    if family.windows == "by_layer" and window is None and config.get("layer_types") and any(windowed):
        raise CheckpointError(
            f"{sizes.where}: `layer_types` asks for sliding_attention, but `use_sliding_window` or `sliding_window` "
            "switches it off"
        )
    if window is None or window >= context or not any(windowed):
        return None, no_layer
    return window, windowed


def _windowed_layers(config: Mapping[str, Any], sizes: _Sizes, layers: int) -> tuple[bool, ...]:
    types = config.get("layer_types")
    if types is None:
        first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
        if type(first) is not int or first < 0:
            raise CheckpointError(f"{sizes.where}: `max_window_layers` must be a whole number, got {first!r}")
        return tuple(layer >= first for layer in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise CheckpointError(
            f"{sizes.where}: `layer_types` must name {' or '.join(known)} for each of the {layers} layers"
        )
    return tuple(kind == "sliding_attention" for kind in types)


def _epsilon(config: Mapping[str, Any], where: str) -> float:
    value = config.get("rms_norm_eps")
    if value is None:
        raise CheckpointError(f"{where}: `rms_norm_eps` is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise CheckpointError(f"{where}: `rms_norm_eps` must be a number between 0 and 1, got {value!r}")
    return float(value)


def _flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: `{name}` must be true or false, got {value!r}")
    return bool(value)


def _check_token_ids(config: Mapping[str, Any], vocab_size: int, where: str) -> None:
    eos = config.get("eos_token_id")
    for token in eos if isinstance(eos, list) else [eos]:
        if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
            raise CheckpointError(f"{where}: `eos_token_id` {token!r} is not in the vocabulary of {vocab_size} tokens")
