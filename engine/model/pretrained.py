"""Where a model comes from and where it goes: a Hugging Face folder, or a `transformers` model in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.errors import CheckpointError, RunError
from icegrt.model.architecture import DTYPES, Architecture

_MAX_FILE_BYTES = 4 << 30


class Pretrained:
    """A checkpoint that can be read tensor by tensor.

    `source`: path of a folder with `config.json` and safetensors, or a `transformers` model.
    """

    def __init__(self, source: Any) -> None:
        self.where = str(source) if isinstance(source, (str, Path)) else f"the given {type(source).__name__}"
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if isinstance(source, (str, Path)):
            self.architecture = Architecture.from_pretrained(source)
            self.folder: Path | None = Path(source)
            self._files = _find_tensors(self.folder)
        elif hasattr(source, "state_dict") and hasattr(source, "config"):
            self.architecture = Architecture.from_config(source.config.to_dict(), where=self.where)
            self.folder = None
            self._tensors = source.state_dict()
        else:
            raise CheckpointError(
                f"expected the folder of a Hugging Face checkpoint or a transformers model, got {type(source).__name__}"
            )

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._tensors.keys() or self._files.keys()

    def get(self, name: str) -> Tensor:
        """One tensor, read now."""
        if name in self._tensors:
            return self._tensors[name].detach()
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        try:
            return self._open[path].get_tensor(name)
        except Exception as error:  # safetensors' own, or the system's where the file is cut short
            raise CheckpointError(f"{path}: tensor `{name}` cannot be read ({error})") from None


def _open_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); copy the file again") from None


def _find_tensors(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / Path(file).name for name, file in files.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors ({error!r}); copy the file again") from None
    single = folder / "model.safetensors"
    if single.is_file():
        return {name: single for name in _open_safetensors(single).keys()}  # noqa: SIM118 (not a dict)
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    hint = (
        f"; {pickled[0].name} is a pickle and is not read: convert it with "
        "`transformers` (`from_pretrained(...).save_pretrained(...)`)"
        if pickled
        else ""
    )
    raise CheckpointError(f"{folder}: no model.safetensors or model.safetensors.index.json{hint}")


def save_pretrained(
    tensors: Iterator[tuple[str, Tensor]],
    architecture: Architecture,
    out: str | Path,
    *,
    classifier: bool,
    dtype: str = "fp32",
    tokenizer: Any = None,
    extra_files: dict[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face folder: safetensors, config, generation config, tokenizer. Aside first, then renamed.

    `classifier`: `AutoModelForSequenceClassification` with one label instead of a causal LM. `extra_files`: JSON
    documents to lay beside them. Raises `RunError` if `out` holds files or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: not an empty folder; choose another folder for the exported model")
    aside = out.with_name(out.name + ".writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_tensors(tensors, aside)
        config = _hf_config(architecture, classifier, dtype, tokenizer)
        _write_json(aside / "config.json", config)
        if not classifier:
            _write_json(aside / "generation_config.json", _generation_config(config))
        for name, document in (extra_files or {}).items():
            _write_json(aside / name, document)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
    return out


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    files: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            path = folder / f"part-{len(files):05d}"
            save_file(pending, path, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(pending, len(files)))
            files.append(path)
            pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        if pending_bytes + tensor.nbytes > _MAX_FILE_BYTES:
            flush()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": {n: names[i] for n, i in weight_map.items()}}
    _write_json(folder / "model.safetensors.index.json", index)


def _hf_config(architecture: Architecture, classifier: bool, dtype: str, tokenizer: Any) -> dict[str, Any]:
    config = dict(architecture.hf_config)
    family = architecture.family
    config["architectures"] = [family.sequence_classifier if classifier else family.causal_lm]
    config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)
    if classifier:
        config.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, tie_word_embeddings=False)
    if tokenizer is not None:
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            if getattr(tokenizer, name, None) is not None:
                config[name] = getattr(tokenizer, name)
    return config


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_model(source: Any, head: str, *, dtype: torch.dtype, new_head: bool = False):
    """A `LanguageModel` with a checkpoint's weights. `head`: 'lm' or 'scalar'; `new_head`: a missing one is zero."""
    from icegrt.model import weights
    from icegrt.model.language_model import LanguageModel

    pretrained = source if isinstance(source, Pretrained) else Pretrained(source)
    config = pretrained.architecture.transformer_config(dtype=dtype)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = LanguageModel(pretrained.architecture, config, head).to(device)
    weights.load(model, pretrained, new_head=new_head)
    return model
