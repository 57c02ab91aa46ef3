"""Adapters in the format of `peft`: `adapter_config.json` and `adapter_model.safetensors`.

The hash of the trunk is in the header of the safetensors file, where `peft` ignores it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.config import LoRAConfig
from icegrt.errors import CheckpointError, ConfigError
from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.hf.reader import open_safetensors
from icegrt.model.hf.safetensors_writer import write_file
from icegrt.model.lora.spec import TARGETS, AdapterSpec, adapter_mapping
from icegrt.model.lora.trunk_hash import TrunkIdentity
from icegrt.utils.files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TRUNK_HASH = "icegrt_trunk_hash"
_TASKS: dict[HeadKind, str] = {"lm": "CAUSAL_LM", "scalar": "SEQ_CLS"}
# Keys of adapter_config.json that change what an adapter computes, with the values that are supported.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "init_lora_weights": (None, True, False, "gaussian"),
}


def is_adapter(source: Any) -> bool:
    """Return whether a path is the folder of an adapter."""
    return isinstance(source, (str, Path)) and (Path(source) / CONFIG).is_file()


def write_adapter(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    spec: AdapterSpec,
    head: HeadKind,
    trunk: TrunkIdentity,
) -> None:
    """Write an adapter, fp32.

    Args:
        folder: an existing folder.
        tensors: all tensors of `adapter_mapping()` in its order, fp32 on the CPU.
        architecture: of the trunk.
        spec: of the adapter.
        head: 'scalar' writes the head too.
        trunk: the checkpoint that it was trained on.
    """
    shapes = {
        f"{_PREFIX}{name}": shape
        for entry in adapter_mapping(architecture, spec, head)
        for name, shape in zip(entry.sources, entry.shapes, strict=True)
    }
    prefixed: Iterator[tuple[str, Tensor]] = ((f"{_PREFIX}{name}", tensor) for name, tensor in tensors)
    write_file(folder / WEIGHTS, prefixed, shapes, torch.float32, {_TRUNK_HASH: trunk.hash})
    document = {
        "peft_type": "LORA",
        "task_type": _TASKS[head],
        "base_model_name_or_path": trunk.where or None,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": list(spec.targets),
        "modules_to_save": ["score"] if head == "scalar" else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


class AdapterReader:
    """Reads the tensors of an adapter.

    The constructor reads the configuration and the header of the tensors.

    Args:
        folder: of the adapter.

    Attributes:
        folder: of the adapter.
        where: its name in error messages.
        spec: rank, scale and projections.
        head: 'scalar' if the adapter comes with a scalar head.
        trunk_hash: of the checkpoint that it was trained on; empty: not written by icegrt.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of a kind that is not supported.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.where = Path(folder), str(folder)
        self.spec, self.trunk_hash = _spec(self.folder / CONFIG), ""
        self._path = self.folder / WEIGHTS
        if not self._path.is_file():
            raise CheckpointError(f"{self.where}: no {WEIGHTS}; save the adapter with safe_serialization=True")
        self._described: dict[str, tuple[tuple[int, ...], str]] = {}
        with open_safetensors(self._path) as file:
            self.trunk_hash = (file.metadata() or {}).get(_TRUNK_HASH, "")
            for name in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(name)
                self._described[name.removeprefix(_PREFIX)] = tuple(header.get_shape()), str(header.get_dtype())
        self.head: HeadKind = "scalar" if "score.weight" in self._described else "lm"

    def names(self) -> Iterable[str]:
        """Return the names of all tensors, without the prefix of `peft`."""
        return self._described.keys()

    def get(self, name: str, *slices: slice) -> Tensor:
        """Read a tensor, or a slice of it."""
        with open_safetensors(self._path) as file:
            tensor: Tensor = file.get_slice(f"{_PREFIX}{name}")[slices or (slice(None),)]
            return tensor

    def check(self, architecture: Architecture, trunk: TrunkIdentity) -> None:
        """Check that the adapter belongs to a trunk. Reads no tensor.

        Args:
            architecture: of the trunk.
            trunk: its checkpoint.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape, or the adapter was trained on other
                weights.
        """
        expected = {
            name: shape
            for entry in adapter_mapping(architecture, self.spec, self.head)
            for name, shape in zip(entry.sources, entry.shapes, strict=True)
        }
        for name in sorted(expected.keys() ^ self._described.keys()):
            problem = "is missing" if name in expected else "belongs to no projection of the trunk"
            raise CheckpointError(f"{self.where}: tensor `{name}` {problem}; the trunk is {name_of(trunk)}")
        for name, shape in expected.items():
            if self._described[name][0] != shape:
                raise CheckpointError(
                    f"{self.where}: tensor `{name}` has shape {self._described[name][0]}, where rank "
                    f"{self.spec.rank} on {name_of(trunk)} asks for {shape}"
                )
        check_trunk(self.where, self.trunk_hash, trunk)


def check_trunk(adapter: str, trained_on: str, trunk: TrunkIdentity) -> None:
    """Check that an adapter was trained on a trunk.

    An adapter without a hash, which peft wrote, passes, as does a trunk without one, of which no tensor was read.

    Args:
        adapter: name of the adapter.
        trained_on: hash of the trunk that it was trained on.
        trunk: the trunk at hand.

    Raises:
        CheckpointError: it was trained on other weights.
    """
    if trained_on and trunk.hash and trained_on != trunk.hash:
        raise CheckpointError(
            f"{adapter}: an adapter of other weights (hash {trained_on[:12]}) than those of {name_of(trunk)} (hash "
            f"{trunk.hash[:12]}). Name the checkpoint that it was trained on, or train an adapter on this one"
        )


def name_of(trunk: TrunkIdentity) -> str:
    """Return the name of a trunk in messages."""
    return trunk.where or "the given model"


def _spec(path: Path) -> AdapterSpec:
    document = read_object(path)
    for key, values in _SUPPORTED.items():
        if document.get(key) not in values:
            raise CheckpointError(
                f"{path}: `{key}` is {document.get(key)!r}; only {values[-1]!r} is supported. Merge the adapter with "
                "peft (`merge_and_unload`), and use the merged model"
            )
    saved = document.get("modules_to_save") or []
    if not set(saved) <= {"score", "classifier"}:
        raise CheckpointError(f"{path}: `modules_to_save` is {saved}; only a `score` head is supported")
    targets = document.get("target_modules")
    if isinstance(targets, str):
        targets = TARGETS if targets == "all-linear" else [targets]
    try:
        config = LoRAConfig(
            rank=document.get("r"),
            alpha=document.get("lora_alpha"),
            target_modules=list(targets or []),
            use_rslora=bool(document.get("use_rslora")),
        )
        return AdapterSpec.of(config, "lora")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
