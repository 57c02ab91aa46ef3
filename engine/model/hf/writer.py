"""Write a Hugging Face checkpoint folder: safetensors, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from icegrt.errors import RunError
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.hf import mapping
from icegrt.model.hf.safetensors_writer import write_safetensors
from icegrt.utils.console import is_main
from icegrt.utils.files import staged_folder

_SHARD_BYTES = 5_000_000_000  # of files on export; what transformers writes


def save_pretrained(
    tensors: Iterator[tuple[str, Tensor]],
    architecture: Architecture,
    out: str | Path,
    *,
    classifier: bool,
    dtype: str = "fp32",
    tokenizer: Any = None,
    extra_files: dict[str, Any] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    replace: bool = False,
) -> Path:
    """Write a Hugging Face folder: safetensors, config, generation config, tokenizer. Aside first, then renamed.

    `tensors`: all of `parameter_mapping()`, in its order, on the CPU, in `dtype`; one is held at a time. `classifier`:
    `AutoModelForSequenceClassification` with one label instead of a causal LM. `extra_files`: JSON documents to lay
    beside them. `shard_bytes`: the most that a file holds. `replace`: swap it for a folder that is there.
    Raises `RunError` if `out` holds files or cannot be written.
    All ranks call it, with the `tensors` of `export_tensors`; rank 0 writes.
    """
    out = Path(out)
    if not is_main():
        for _ in tensors:
            pass
        return out
    if not replace and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: not an empty folder; choose another folder for the exported model")
    try:
        with staged_folder(out, replace=replace) as staging:
            shapes = mapping.source_shapes(architecture, "scalar" if classifier else "lm")
            write_safetensors(staging, tensors, shapes, DTYPES[dtype], shard_bytes)
            _write_documents(staging, architecture, classifier, dtype, tokenizer, extra_files or {})
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
    return out


def _write_documents(
    folder: Path,
    architecture: Architecture,
    classifier: bool,
    dtype: str,
    tokenizer: Any,
    extra_files: dict[str, Any],
) -> None:
    config = _hf_config(architecture, classifier, dtype, tokenizer)
    _write_json(folder / "config.json", config)
    if not classifier:
        _write_json(folder / "generation_config.json", _generation_config(architecture, config))
    for name, document in extra_files.items():
        _write_json(folder / name, document)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _hf_config(architecture: Architecture, classifier: bool, dtype: str, tokenizer: Any) -> dict[str, Any]:
    config = dict(architecture.hf_config)
    family = architecture.family
    config["architectures"] = [family.sequence_classifier if classifier else family.causal_lm]
    config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    for name in ("torch_dtype", "_name_or_path", "auto_map"):  # `auto_map`: the code that it names is not handed on
        config.pop(name, None)
    if classifier:
        config.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, tie_word_embeddings=False)
    if tokenizer is not None:
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(tokenizer, name, None) is not None:
                config[name] = getattr(tokenizer, name)
        config["eos_token_id"] = _union(tokenizer.eos_token_id, config.get("eos_token_id"))
    if classifier and config.get("pad_token_id") in token_ids(config.get("eos_token_id")):
        # transformers scores the last token that is not padding, which would not be the EOS that is scored here.
        # Without a pad token it scores the last one, and refuses a padded batch.
        config["pad_token_id"] = None
    return config


def _generation_config(architecture: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in architecture.generation_config.items() if not name.startswith("_")}
    for name in ("bos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            settings[name] = config[name]
    settings["eos_token_id"] = _union(config.get("eos_token_id"), settings.get("eos_token_id"))
    return {name: value for name, value in settings.items() if value is not None}


def token_ids(named: int | list[int] | None) -> list[int]:
    """What a configuration names as its EOS, as a list: nothing, one token or several."""
    return named if isinstance(named, list) else [] if named is None else [named]


def _union(one: int | list[int] | None, other: int | list[int] | None) -> int | list[int] | None:
    ids = list(dict.fromkeys([*token_ids(one), *token_ids(other)]))
    return ids if len(ids) > 1 else next(iter(ids), None)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
