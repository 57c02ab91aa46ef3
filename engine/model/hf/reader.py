"""Where a model comes from and where it goes: a Hugging Face folder, or a `transformers` model in memory."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.errors import CheckpointError, RunError
from icegrt.model.architecture import DTYPES, Architecture, read_object
from icegrt.model.hf import mapping as weights
from icegrt.model.hf.safetensors_writer import write_safetensors
from icegrt.utils.console import is_main

_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000  # of files on export; what transformers writes
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Pretrained:
    """A checkpoint that can be read tensor by tensor, and of a tensor only the part that is asked for.

    `source`: path of a folder with `config.json` and safetensors, or a `transformers` model. Names, shapes and dtypes
    are read at once, from the headers; a file that is cut short is found then. No pickle is read and no code of the
    checkpoint runs. Raises `CheckpointError` naming the file or key.
    """

    def __init__(self, source: Any) -> None:
        self.where = str(source) if isinstance(source, (str, Path)) else f"the given {type(source).__name__}"
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._described: dict[str, tuple[tuple[int, ...], str]] = {}
        if isinstance(source, (str, Path)):
            self.architecture = Architecture.from_pretrained(source)
            self.folder: Path | None = Path(source)
            self._find_tensors(self.folder)
        elif hasattr(source, "state_dict") and hasattr(source, "config"):
            generation = getattr(source, "generation_config", None)
            self.architecture = Architecture.from_config(
                source.config.to_dict(), self.where, generation.to_diff_dict() if generation is not None else {}
            )
            self.folder = None
            self._tensors = source.state_dict()
            for name, tensor in self._tensors.items():
                self._described[name] = tuple(tensor.shape), _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        else:
            raise CheckpointError(
                f"expected the folder of a Hugging Face checkpoint or a transformers model, got {type(source).__name__}"
            )

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._described.keys()

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype ('F32', 'BF16', ...) of a tensor."""
        return self._described[name]

    def get(self, name: str, *part: slice) -> Tensor:
        """One tensor, or a part of it (a slice for each dimension), read now; nothing else of it is."""
        part = part or (slice(None),)
        if name in self._tensors:
            return self._tensors[name].detach()[part]
        # Opened for this one part: what a mapped file has handed out counts as this process's memory until it is
        # closed.
        path = self._files[name]
        with _open_safetensors(path) as file:
            try:
                return file.get_slice(name)[part]
            except Exception as error:  # safetensors' own, or the system's where the file was cut short meanwhile
                raise CheckpointError(f"{path}: tensor `{name}` cannot be read ({error})") from None

    def _find_tensors(self, folder: Path) -> None:
        index = _read_index(folder) if (folder / _INDEX).is_file() else {}
        single = folder / "model.safetensors"
        if not index and not single.is_file():
            raise CheckpointError(_no_safetensors(folder))
        for path in sorted(set(index.values())) or [single]:
            with _open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if index.get(name, path) == path:
                        self._files[name] = path
                        part = file.get_slice(name)
                        self._described[name] = tuple(part.get_shape()), str(part.get_dtype())
        for name, path in index.items():
            if name not in self._files:
                raise CheckpointError(f"{path}: holds no tensor `{name}`, which {_INDEX} says it does; copy it again")


def _open_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); copy the file again") from None


def _read_index(folder: Path) -> dict[str, Path]:
    path = folder / _INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: not an index of safetensors (no `weight_map`); copy the file again")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(folder, file):
            raise CheckpointError(
                f"{path}: names {file!r} for `{name}`, which is not a file of this folder; nothing outside "
                f"{folder} is read"
            )
        files[name] = folder / file
    return files


def _is_inside(folder: Path, file: str) -> bool:
    if not file.endswith(".safetensors") or ".." in Path(file).parts:
        return False
    home, path = folder.resolve(), (folder / file).resolve()
    # The cache of the Hugging Face hub holds `snapshots/<revision>/` of links into the `blobs/` beside it.
    blobs = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    return any(path.is_relative_to(place) for place in (home, *blobs))


def _no_safetensors(folder: Path) -> str:
    text = f"{folder}: no model.safetensors or {_INDEX}"
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not pickled:
        return text
    names = read_object(folder / "config.json").get("architectures")
    scores = bool(isinstance(names, list) and names and str(names[0]).endswith("ForSequenceClassification"))
    kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    origin, target = json.dumps(str(folder)), json.dumps(f"{folder}-safetensors")
    code = (
        f'import transformers as t; t.{kind}.from_pretrained({origin}, dtype="auto").save_pretrained({target}); '
        f"t.AutoTokenizer.from_pretrained({origin}).save_pretrained({target})"
    )
    return (
        f"{text}; {pickled[0].name} is a pickle, which could run code and is not read. If you trust it, convert it:\n"
        f"  python -c {shlex.quote(code)}"
    )


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
) -> Path:
    """Write a Hugging Face folder: safetensors, config, generation config, tokenizer. Aside first, then renamed.

    `tensors`: all of `weights.layout`, in its order, on the CPU, in `dtype`; one is held at a time. `classifier`:
    `AutoModelForSequenceClassification` with one label instead of a causal LM. `extra_files`: JSON documents to lay
    beside them. `shard_bytes`: the most that a file holds. Raises `RunError` if `out` holds files or cannot be written.
    All ranks call it, with the `tensors` of `weights.export_tensors`; rank 0 writes.
    """
    out = Path(out)
    if not is_main():
        for _ in tensors:
            pass
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: not an empty folder; choose another folder for the exported model")
    aside = out.with_name(out.name + ".writing")
    new_folders = [folder for folder in aside.parents if not folder.exists()]
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        shapes = weights.source_shapes(architecture, "scalar" if classifier else "lm")
        write_safetensors(aside, tensors, shapes, DTYPES[dtype], shard_bytes)
        _write_documents(aside, architecture, classifier, dtype, tokenizer, extra_files or {})
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in new_folders:
                folder.rmdir()
        if isinstance(error, OSError):
            raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
        raise
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


def build_model(source: Any, head: str, *, dtype: torch.dtype, new_head: bool = False, recompute: str = "none"):
    """What this rank holds of a model, a `LanguageModel`, with a checkpoint's weights.

    `head`: 'lm' or 'scalar'; `new_head`: a missing one is zero; `recompute`: as the key of that name.
    """
    from icegrt.model.language_model import assemble

    pretrained = source if isinstance(source, Pretrained) else Pretrained(source)
    # Before memory is taken for a model: the sizes in config.json may be anyone's.
    weights.check(pretrained, head, new_head=new_head)
    model = assemble(pretrained.architecture, head, dtype=dtype, recompute=recompute)
    weights.load(model, pretrained)
    return model
