"""The supported families of checkpoints, and the keys that their `config.json` may have.

A key is read, or has no effect on the model, or must have the one value that icegrt computes with. Any other key is an
error: icegrt would compute another model than the checkpoint's author trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from icegrt.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """The differences between families: names in Hugging Face, and parts of a layer.

    Attributes:
        model_type: the key of that name in `config.json`.
        causal_lm: class name of the language model in `transformers`.
        sequence_classifier: class name of the model with a scalar head in `transformers`.
        qkv_bias: query, key and value have a bias.
        optional_bias: `attention_bias` may give query, key, value and the output projection a bias.
        qk_norm: query and key are normalised per head.
        windows: which layers may have a sliding window.
        defaults: the defaults of `transformers` that differ between families.
    """

    model_type: str
    causal_lm: str
    sequence_classifier: str
    qkv_bias: bool = False
    optional_bias: bool = False
    qk_norm: bool = False
    windows: Literal["none", "all_layers", "by_layer"] = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)


# One row per family; all of them share Llama's tensor names (`hf/mapping.py`).
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "LlamaForSequenceClassification", optional_bias=True),
        Family(
            "mistral",
            "MistralForCausalLM",
            "MistralForSequenceClassification",
            windows="all_layers",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            "Qwen2ForSequenceClassification",
            qkv_bias=True,
            windows="by_layer",
            defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            "Qwen3ForSequenceClassification",
            optional_bias=True,
            qk_norm=True,
            windows="by_layer",
            defaults={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        ),
    )
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = _words(
    "model_type num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
    "vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_scaling rope_theta "
    "original_max_position_embeddings bos_token_id eos_token_id pad_token_id num_labels"
)
_READ_WITH_WINDOWS = {
    "none": frozenset(),
    "all_layers": frozenset({"sliding_window"}),
    "by_layer": frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}),
}
# The one supported value of a key.
_BOUND = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
# Bookkeeping, training settings (icegrt has no dropout), and the generation settings that transformers before version 5
# kept in every configuration. `auto_map` names code, which icegrt does not run.
_WITHOUT_EFFECT = _words(
    "architectures auto_map dtype torch_dtype transformers_version name_or_path tokenizer_class use_cache "
    "initializer_range attention_dropout hidden_dropout resid_pdrop classifier_dropout pretraining_tp "
    "max_sequence_length seq_length id2label label2id problem_type finetuning_task task_specific_params "
    "return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss is_decoder "
    "chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id sep_token_id unk_token_id prefix "
    "use_flash_attention_2 attn_implementation gradient_checkpointing unsloth_version unsloth_fixed "
    "is_llama_config model_name transformers.js_config "
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
    "suppress_tokens begin_suppress_tokens"
)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a configuration.

    Raises:
        CheckpointError: `model_type` is missing or not supported.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        fault = f"model_type {config['model_type']!r} is not supported" if "model_type" in config else "no model_type"
        raise CheckpointError(f"{where}: {fault}; supported: {', '.join(FAMILIES)}")
    return family


def refuse_unsupported(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Check that the configuration has no key or value that changes the model in an unsupported way.

    Raises:
        CheckpointError: names the key.
    """
    for name in ("quantization_config", "compression_config"):
        if config.get(name):
            raise CheckpointError(
                f"{where}: `{name}`: quantised weights are not supported; use the checkpoint that they were made from, "
                "in fp32 or bf16"
            )
    known = _READ | _READ_WITH_WINDOWS[family.windows] | _WITHOUT_EFFECT
    if family.optional_bias:
        known |= {"attention_bias"}
    for name, value in config.items():
        if name in known or name.startswith("_") or value is None:
            continue
        if name not in _BOUND:
            raise CheckpointError(
                f"{where}: `{name}` is not a key that icegrt knows of a {family.model_type} model, so it may change "
                "what the model computes; if you know that it does not, remove it"
            )
        if value != _BOUND[name]:
            raise CheckpointError(
                f"{where}: `{name}` is {json.dumps(value)}; of a {family.model_type} model only "
                f"{json.dumps(_BOUND[name])} is supported"
            )
