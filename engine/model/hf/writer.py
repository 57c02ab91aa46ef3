"""Write a Hugging Face checkpoint folder: safetensors, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from icegrt.data.tokenizer import save_tokenizer
from icegrt.errors import RunError
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.hf import mapping
from icegrt.model.hf.safetensors_writer import write_safetensors
from icegrt.utils.console import is_main
from icegrt.utils.files import staged_folder

_SHARD_BYTES = 5_000_000_000  # largest file of an export, as transformers writes it


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
    """Write a Hugging Face folder to a staging directory, then rename it. All ranks must call it; rank 0 writes.

    Args:
        tensors: all tensors of `parameter_mapping()` in its order, on the CPU, in `dtype`, as `export_tensors` yields
            them. One is in memory at a time.
        architecture: sizes and configuration of the model.
        out: the folder to write.
        classifier: write `AutoModelForSequenceClassification` with one label instead of a causal LM.
        dtype: 'fp32' or 'bf16'.
        tokenizer: a `transformers` tokenizer to save in the folder.
        extra_files: JSON documents by file name.
        shard_bytes: largest size of a safetensors file.
        replace: replace a folder that exists.

    Returns:
        `out` as a path.

    Raises:
        RunError: `out` holds files and `replace` is false, or it cannot be written.
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
        save_tokenizer(tokenizer, folder)


def _hf_config(architecture: Architecture, classifier: bool, dtype: str, tokenizer: Any) -> dict[str, Any]:
    config = dict(architecture.hf_config)
    family = architecture.family
    config["architectures"] = [family.sequence_classifier if classifier else family.causal_lm]
    config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    for name in ("torch_dtype", "_name_or_path", "auto_map"):  # `auto_map` names code that the export does not contain
        config.pop(name, None)
    if classifier:
        config.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, tie_word_embeddings=False)
    if tokenizer is not None:
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(tokenizer, name, None) is not None:
                config[name] = getattr(tokenizer, name)
        config["eos_token_id"] = _union(tokenizer.eos_token_id, config.get("eos_token_id"))
    if classifier and config.get("pad_token_id") in token_ids(config.get("eos_token_id")):
        # transformers 5: scores the last token that is not padding -> with EOS as pad token it would skip the EOS that
        # icegrt scores. Without a pad token it scores the last token, and rejects a padded batch.
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
    """Return the EOS entry of a configuration (None, one token or several) as a list."""
    return named if isinstance(named, list) else [] if named is None else [named]


def _union(one: int | list[int] | None, other: int | list[int] | None) -> int | list[int] | None:
    ids = list(dict.fromkeys([*token_ids(one), *token_ids(other)]))
    return ids if len(ids) > 1 else next(iter(ids), None)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
