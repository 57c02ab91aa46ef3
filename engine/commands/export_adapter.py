"""Export the adapter of a run's checkpoint: merged with its trunk, or alone in the format of `peft`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.checkpoint.tensor_reader import CheckpointTensors
from icegrt.config import ExportConfig
from icegrt.errors import CheckpointError, ConfigError, RunError
from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.hf import exporter, mapping
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.lora.model import merged
from icegrt.model.lora.peft_format import check_trunk, write_adapter
from icegrt.model.lora.spec import AdapterSpec, adapter_mapping
from icegrt.model.lora.trunk_hash import TrunkIdentity, identity_of
from icegrt.utils.files import staged_folder


class SavedAdapter:
    """The adapter of one role in a checkpoint.

    Args:
        tensors: of the role.
        role: its entry in the checkpoint's JSON document.
        architecture: of the trunk.

    Raises:
        CheckpointError: a tensor is missing, damaged, or not finite.
    """

    def __init__(self, tensors: CheckpointTensors, role: dict[str, Any], architecture: Architecture) -> None:
        self.architecture, self.where = architecture, str(tensors.folder)
        self.head: HeadKind = role["head"]
        self.spec = AdapterSpec.from_document(role["adapter"])
        self.trunk = TrunkIdentity(role["adapter"]["trunk_hash"], role["adapter"]["trunk"])
        self.tensors: dict[str, Tensor] = {}
        for entry in adapter_mapping(architecture, self.spec, self.head):
            weight = tensors.read(entry.name)
            if not bool(weight.isfinite().all()):
                raise CheckpointError(
                    f"{self.where}: `{entry.name}` holds NaN or infinity; export a checkpoint from before training "
                    "broke"
                )
            self.tensors |= exporter.exported(entry, [weight], architecture, torch.float32)

    def write(self, out: str | Path, extra_files: dict[str, Any]) -> Path:
        """Write the adapter as a folder that `peft` loads.

        Raises:
            RunError: it cannot be written.
        """
        out = Path(out)
        try:
            with staged_folder(out) as staging:
                items = self.tensors.items()
                write_adapter(staging, items, self.architecture, self.spec, self.head, self.trunk)
                for name, document in extra_files.items():
                    (staging / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
        return out

    def merged_tensors(self, config: ExportConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the merged model, one at a time.

        Raises:
            CheckpointError: the trunk cannot be read, or is another than the adapter was trained on.
            ConfigError: it is not known where the trunk is.
        """
        where = config.base or self.trunk.where
        if not where:
            raise ConfigError(
                "export.base is empty, and the run got its model in memory; name the checkpoint that the adapter was "
                "trained on, or set export.adapter=true"
            )
        base = HFCheckpointReader(where)
        check_trunk(self.where, self.trunk.hash, identity_of(base))
        return self._merge(base, dtype)

    def _merge(self, base: HFCheckpointReader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for name in mapping.source_shapes(self.architecture, self.head):
            own = self.tensors.get(name)
            weight = base.get(name).float() if own is None else own
            yield name, merged(weight, name, self.tensors, self.spec).to(dtype)
