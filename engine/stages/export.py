"""A run's last checkpoint as a Hugging Face checkpoint. Needs neither a GPU nor torchrun."""

from __future__ import annotations

from pathlib import Path

from icegrt import checkpoint
from icegrt.cluster import Cluster
from icegrt.config import ExportConfig
from icegrt.console import say
from icegrt.data import load_tokenizer
from icegrt.errors import CheckpointError, ConfigError, RunError
from icegrt.model import weights
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.language_model import LanguageModel
from icegrt.model.pretrained import save_pretrained
from icegrt.roles.role import Role


def run(config: ExportConfig) -> None:
    """The command: write `export.role` of the run at `export.run` to `export.out`."""
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
    architecture = Architecture.from_config(kind["hf_config"], where=str(found[-1]))
    tokenizer = load_tokenizer(str(Path(config.run) / "tokenizer"), say=say)
    dtype = DTYPES[config.dtype]
    with Cluster.open():
        model = LanguageModel(architecture, architecture.transformer_config(dtype=dtype), kind["head"])
        checkpoint.load(found[-1], [Role(config.role, model)])
        out = save_pretrained(
            weights.export_tensors(model, dtype),
            architecture,
            config.out,
            classifier=kind["head"] == "scalar",
            dtype=config.dtype,
            tokenizer=tokenizer,
        )
    say(f"{config.role} at step {saved['step']}: {out}")
