"""Where a model comes from and where it goes: a Hugging Face folder, or a `transformers` model in memory."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from icegrt.errors import CheckpointError
from icegrt.model.architecture import Architecture
from icegrt.utils.files import read_object

_INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TransformersModel(Protocol):
    """A `transformers` model in memory."""

    config: Any

    def state_dict(self) -> Mapping[str, Any]: ...


# The path of a Hugging Face checkpoint, or a model in memory.
ModelSource = str | Path | TransformersModel


class HFCheckpointReader:
    """A checkpoint that can be read tensor by tensor, and of a tensor only the part that is asked for.

    `source`: path of a folder with `config.json` and safetensors, or a `transformers` model. Names, shapes and dtypes
    are read at once, from the headers; a file that is cut short is found then. No pickle is read and no code of the
    checkpoint runs. Raises `CheckpointError` naming the file or key.
    """

    def __init__(self, source: ModelSource) -> None:
        self.where = str(source) if isinstance(source, (str, Path)) else f"the given {type(source).__name__}"
        self._tensors: Mapping[str, Tensor] = {}
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


def _open_safetensors(path: Path) -> Any:
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
