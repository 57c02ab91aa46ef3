"""Export a model of a run's checkpoint as a Hugging Face checkpoint, one tensor at a time, without GPU or torchrun."""

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
from icegrt.commands.export_adapter import SavedAdapter
from icegrt.config import ExportConfig
from icegrt.data import load_tokenizer
from icegrt.errors import CheckpointError, ConfigError, RunError
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.hf import exporter, mapping
from icegrt.model.hf.score_statistics import SCORE_STATISTICS
from icegrt.model.hf.writer import save_pretrained
from icegrt.utils.console import is_main, print_info, warn


def run(config: ExportConfig) -> None:
    """Write `export.role` of the run at `export.run` to `export.out`. Ranks other than 0 do nothing."""
    if not is_main():
        return
    for key in ("run", "out"):
        if not getattr(config, key):
            raise ConfigError(f"export.{key} is empty; it must be given")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: already there, and not an empty folder; set export.out to another folder")
    checkpoint = _checkpoint_to_export(config)
    state = read_state(checkpoint)
    role_name = _stored_role(checkpoint, config.role)
    if role_name not in state["roles"]:
        reason = " (an estimator other than gae in ppo.advantage has no critic)" if role_name == "critic" else ""
        raise ConfigError(f"export.role: {checkpoint} holds {', '.join(state['roles'])}, not {config.role}{reason}")
    role = state["roles"][role_name]
    architecture = Architecture.from_config(role["hf_config"], str(checkpoint), role.get("generation_config"))
    tokenizer = load_tokenizer(str(Path(config.run) / "tokenizer"), print_info=print_info)
    extra_files = {}
    if state.get("stage") == "reward":
        if statistics := state["trainer"].get("score_statistics"):
            extra_files[SCORE_STATISTICS] = statistics
        else:
            warn(f"{checkpoint}: no {SCORE_STATISTICS}, because held-out scores were not evaluated at this step")
    tensors, dtype = CheckpointTensors(checkpoint / role_name), DTYPES[config.dtype]
    adapter = SavedAdapter(tensors, role, architecture) if role.get("adapter") else None
    if config.adapter:
        if adapter is None:
            raise ConfigError(f"export.adapter is true, but {checkpoint} holds a whole model; set it to false")
        out = adapter.write(config.out, extra_files)
        print_info(f"adapter of {role_name} at step {state['step']}: {out}")
        return
    out = save_pretrained(
        adapter.merged_tensors(config, dtype) if adapter else _tensors(tensors, architecture, role["head"], dtype),
        architecture,
        config.out,
        classifier=role["head"] == "scalar",
        dtype=config.dtype,
        tokenizer=tokenizer,
        extra_files=extra_files,
        shard_bytes=int(config.shard_gigabytes * 1e9),
    )
    print_info(f"{role_name} at step {state['step']}: {out}")


def _checkpoint_to_export(config: ExportConfig) -> Path:
    """Return the checkpoint that `export.checkpoint` names, after verifying the files that the export reads."""

    def faults_of(checkpoint: Path) -> list[str]:
        return verify(checkpoint, only=(STATE, _stored_role(checkpoint, config.role)))

    def damage(faults_by_checkpoint: dict[Path, list[str]]) -> CheckpointError:
        return CheckpointError("\n".join(describe_faults(*item) for item in faults_by_checkpoint.items()))

    if config.checkpoint == "latest":
        checkpoint, damaged = latest_valid(list_checkpoints(config.run), faults_of)
        if checkpoint is None:
            raise damage(damaged) if damaged else CheckpointError(f"{config.run}: holds no checkpoint of a run")
        for later, faults in damaged.items():
            warn(f"{describe_faults(later, faults)}; exporting the one before it")
        return checkpoint
    name = config.checkpoint
    if name == "best":
        with contextlib.suppress(OSError):
            name = (checkpoints_dir(config.run) / BEST).read_text(encoding="utf-8").strip()
    checkpoint = next((path for path in list_checkpoints(config.run) if path.name == name), None)
    if checkpoint is None:
        raise CheckpointError(f"{config.run}: holds no checkpoint `{config.checkpoint}`")
    if faults := faults_of(checkpoint):
        raise damage({checkpoint: faults})
    return checkpoint


def _stored_role(checkpoint: Path, role: str) -> str:
    """Return the role of the checkpoint that `export.role` names: "actor" and "model" name the only role of a run."""
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_dir())
    if role in names or role not in ("actor", "model"):
        return role
    return names[0] if len(names) == 1 else "actor"


def _tensors(
    reader: CheckpointTensors, architecture: Architecture, head: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for spec in mapping.parameter_mapping(architecture, head):
        weight = reader.read(spec.name)
        # NaN propagates through both bounds. `isfinite` of the weight would allocate a copy of it and three masks.
        if not bool(torch.stack(weight.aminmax()).isfinite().all()):
            raise CheckpointError(
                f"{reader.folder}: `{spec.name}` holds NaN or infinity; export a checkpoint from before training broke"
            )
        yield from exporter.exported(spec, [weight], architecture, dtype)
        del weight  # frees its memory before the next one is read
