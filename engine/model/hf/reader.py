"""Read a Hugging Face checkpoint tensor by tensor, from a folder or from a `transformers` model in memory."""

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
from icegrt.model.hf.value_head import stored_names
from icegrt.utils.files import model_folder, read_object

_INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TransformersModel(Protocol):
    """A `transformers` model in memory."""

    config: Any

    def state_dict(self) -> Mapping[str, Any]: ...


# The path of a Hugging Face checkpoint, or a model in memory.
ModelSource = str | Path | TransformersModel


class HFCheckpointReader:
    """Reads tensors, or slices of tensors, of a checkpoint.

    The constructor reads names, shapes and dtypes from the headers, and so finds truncated files. It reads no pickle
    and runs no code of the checkpoint.

    Args:
        source: path of a folder with `config.json` and safetensors, of a run that has ended, or a `transformers`
            model.

    Attributes:
        architecture: sizes and family of the model.
        folder: the folder; None for a model in memory.
        where: name of the source in error messages.

    Raises:
        CheckpointError: names the file or key.
    """

    def __init__(self, source: ModelSource) -> None:
        if isinstance(source, (str, Path)):
            source = model_folder(source)
        self.where = str(source) if isinstance(source, (str, Path)) else f"the given {type(source).__name__}"
        self._tensors: Mapping[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._described: dict[str, tuple[tuple[int, ...], str]] = {}
        if isinstance(source, Path):
            self.architecture = Architecture.from_pretrained(source)
            self.folder: Path | None = source
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
        self._stored = stored_names(self._described)

    def names(self) -> Iterable[str]:
        """Return the names of all tensors; those of a value head of another library are icegrt's."""
        return self._stored.keys()

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return shape and dtype ('F32', 'BF16', ...) of a tensor."""
        return self._described[self._stored[name]]

    def get(self, name: str, *slices: slice) -> Tensor:
        """Read a tensor, or a slice of it.

        Args:
            name: of the tensor.
            slices: one for each leading dimension; none reads the whole tensor.

        Raises:
            CheckpointError: the file cannot be read.
        """
        index = slices or (slice(None),)
        name = self._stored[name]
        if name in self._tensors:
            return self._tensors[name].detach()[index]
        # Opened for every slice: pages of a mapped file count as this process's memory until the file is closed.
        path = self._files[name]
        with open_safetensors(path) as file:
            try:
                return file.get_slice(name)[index]
            except Exception as error:  # of safetensors, or of the system if the file was truncated meanwhile
                raise CheckpointError(f"{path}: tensor `{name}` cannot be read ({error})") from None

    def _find_tensors(self, folder: Path) -> None:
        index = _read_index(folder) if (folder / _INDEX).is_file() else {}
        single = folder / "model.safetensors"
        if not index and not single.is_file():
            raise CheckpointError(_no_safetensors(folder))
        for path in sorted(set(index.values())) or [single]:
            with open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if index.get(name, path) == path:
                        self._files[name] = path
                        header = file.get_slice(name)
                        self._described[name] = tuple(header.get_shape()), str(header.get_dtype())
        for name, path in index.items():
            if name not in self._files:
                raise CheckpointError(f"{path}: holds no tensor `{name}`, which {_INDEX} says it does; copy it again")


def open_safetensors(path: Path) -> Any:
    """Open a file of tensors, for `with`.

    Raises:
        CheckpointError: it cannot be read.
    """
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
    resolved_folder, path = folder.resolve(), (folder / file).resolve()
    # In the cache of the Hugging Face hub `snapshots/<revision>/` holds links into `blobs/`.
    is_snapshot = resolved_folder.parent.name == "snapshots"
    blobs = [resolved_folder.parent.parent / "blobs"] if is_snapshot else []
    return any(path.is_relative_to(allowed) for allowed in (resolved_folder, *blobs))


def _no_safetensors(folder: Path) -> str:
    text = f"{folder}: no model.safetensors or {_INDEX}"
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not pickles:
        return text
    names = read_object(folder / "config.json").get("architectures")
    is_classifier = isinstance(names, list) and names and str(names[0]).endswith("ForSequenceClassification")
    auto_class = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    origin, target = json.dumps(str(folder)), json.dumps(f"{folder}-safetensors")
    code = (
        f'import transformers as t; t.{auto_class}.from_pretrained({origin}, dtype="auto").save_pretrained({target}); '
        f"t.AutoTokenizer.from_pretrained({origin}).save_pretrained({target})"
    )
    return (
        f"{text}; {pickles[0].name} is a pickle, which could run code and is not read. If you trust it, convert it:\n"
        f"  python -c {shlex.quote(code)}"
    )
