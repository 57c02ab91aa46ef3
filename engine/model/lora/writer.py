"""Write the adapter of a model as a folder that `peft` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from icegrt.errors import RunError
from icegrt.model.hf.exporter import export_tensors
from icegrt.model.lora.model import AdaptedModel
from icegrt.model.lora.peft_format import write_adapter
from icegrt.utils.console import is_main
from icegrt.utils.files import staged_folder


def save_adapter(
    model: AdaptedModel, out: str | Path, extra_files: dict[str, Any] | None = None, *, replace: bool = False
) -> Path:
    """Write adapter and scalar head to a staging directory, then rename it. All ranks must call it; rank 0 writes.

    Args:
        model: the adapted model; its parameters are on the device.
        out: the folder to write.
        extra_files: JSON documents by file name.
        replace: replace a folder that exists.

    Returns:
        `out` as a path.

    Raises:
        RunError: `out` cannot be written.
    """
    out = Path(out)
    tensors = list(export_tensors(model, torch.float32))
    if not is_main():
        return out
    assert model.identity is not None
    try:
        with staged_folder(out, replace=replace) as staging:
            write_adapter(staging, tensors, model.architecture, model.adapter, model.head_kind, model.identity)
            for name, document in (extra_files or {}).items():
                (staging / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
    return out
