"""A run's last checkpoint as a Hugging Face checkpoint, one tensor at a time. Needs neither a GPU nor torchrun."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from icegrt.checkpoint.directory import (
    BEST,
    STATE,
    checkpoints_dir,
    describe_faults,
    latest_valid,
    list_checkpoints,
    read_state,
    verify,
)
from icegrt.checkpoint.tensor_reader import CheckpointTensors
from icegrt.config import ExportConfig
from icegrt.data import load_tokenizer
from icegrt.errors import CheckpointError, ConfigError, RunError
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.hf import exporter, mapping
from icegrt.model.hf.writer import save_pretrained
from icegrt.utils.console import is_main, print_info, warn


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
    found = _chosen(config)
    saved = read_state(found)
    if config.role not in saved["roles"]:
        raise ConfigError(f"export.role: {found} holds {', '.join(saved['roles'])}, not {config.role}")
    kind = saved["roles"][config.role]
    architecture = Architecture.from_config(kind["hf_config"], str(found), kind.get("generation_config"))
    tokenizer = load_tokenizer(str(Path(config.run) / "tokenizer"), print_info=print_info)
    out = save_pretrained(
        _tensors(CheckpointTensors(found / config.role), architecture, kind["head"], DTYPES[config.dtype]),
        architecture,
        config.out,
        classifier=kind["head"] == "scalar",
        dtype=config.dtype,
        tokenizer=tokenizer,
        shard_bytes=int(config.shard_gigabytes * 1e9),
    )
    print_info(f"{config.role} at step {saved['step']}: {out}")


def _chosen(config: ExportConfig) -> Path:
    """The checkpoint to export, of which the files that are read agree with the manifest."""

    def faults_of(checkpoint: Path) -> list[str]:
        return verify(checkpoint, only=(STATE, config.role))

    if config.checkpoint == "latest":
        found, damaged = latest_valid(list_checkpoints(config.run), faults_of)
        for checkpoint, what in damaged.items() if found is not None else ():
            warn(f"{describe_faults(checkpoint, what)}; exporting the one before it")
    else:
        name = config.checkpoint
        with contextlib.suppress(OSError):
            name = (checkpoints_dir(config.run) / BEST).read_text(encoding="utf-8").strip() if name == "best" else name
        found = next((p for p in list_checkpoints(config.run) if p.name == name), None)
        damaged = {found: what} if found is not None and (what := faults_of(found)) else {}
    if damaged and (found is None or found in damaged):
        raise CheckpointError("\n".join(describe_faults(checkpoint, what) for checkpoint, what in damaged.items()))
    if found is None:
        what = "no checkpoint of a run" if config.checkpoint == "latest" else f"no checkpoint `{config.checkpoint}`"
        raise CheckpointError(f"{config.run}: holds {what}")
    return found


def _tensors(
    held: CheckpointTensors, architecture: Architecture, head: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for entry in mapping.parameter_mapping(architecture, head):
        yield from exporter.exported(entry, [held.read(entry.name)], architecture, dtype)
