"""A run's last checkpoint as a Hugging Face checkpoint, one tensor at a time. Needs neither a GPU nor torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from icegrt import checkpoint
from icegrt.checkpoint_tensors import CheckpointTensors
from icegrt.config import ExportConfig
from icegrt.console import is_main, say
from icegrt.data import load_tokenizer
from icegrt.errors import CheckpointError, ConfigError, RunError
from icegrt.model import weights
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.pretrained import save_pretrained


def run(config: ExportConfig) -> None:
    """The command: write `export.role` of the run at `export.run` to `export.out`. Of several ranks one does."""
    if not is_main():
        return
    for key in ("run", "out"):
        if not getattr(config, key):
            raise ConfigError(f"export.{key} is empty; it must be given")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: already there, and not an empty folder; set export.out to another place")
    found = checkpoint.list_checkpoints(config.run)
    if not found:
        raise CheckpointError(f"{config.run}: holds no checkpoint of a run")
    saved = checkpoint.read_state(found[-1])
    if config.role not in saved["roles"]:
        raise ConfigError(f"export.role: {found[-1]} holds {', '.join(saved['roles'])}, not {config.role}")
    kind = saved["roles"][config.role]
    architecture = Architecture.from_config(kind["hf_config"], str(found[-1]), kind.get("generation_config"))
    tokenizer = load_tokenizer(str(Path(config.run) / "tokenizer"), say=say)
    out = save_pretrained(
        _tensors(CheckpointTensors(found[-1] / config.role), architecture, kind["head"], DTYPES[config.dtype]),
        architecture,
        config.out,
        classifier=kind["head"] == "scalar",
        dtype=config.dtype,
        tokenizer=tokenizer,
        shard_bytes=int(config.shard_gigabytes * 1e9),
    )
    say(f"{config.role} at step {saved['step']}: {out}")


def _tensors(
    held: CheckpointTensors, architecture: Architecture, head: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for entry in weights.layout(architecture, head):
        yield from weights.exported(entry, [held.read(entry.name)], architecture, dtype)
