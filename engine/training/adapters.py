"""What a checkpoint says about the roles, adapters and frozen modules in it, and whether a run may resume from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icegrt.checkpoint.directory import read_state
from icegrt.errors import ConfigError
from icegrt.model.lora.model import AdaptedModel
from icegrt.model.lora.peft_format import check_trunk
from icegrt.model.pipeline_model import PipelineModel
from icegrt.roles.role import TrainableRole


def adapter_document(model: PipelineModel) -> dict[str, Any] | None:
    """Return rank, scale, projections and trunk of an adapted model as JSON; None for a whole model."""
    if not isinstance(model, AdaptedModel):
        return None
    assert model.identity is not None
    return {**model.adapter.document(), "trunk_hash": model.identity.hash, "trunk": model.identity.where}


def check_resume(checkpoint: Path, roles: Sequence[TrainableRole], section: str) -> None:
    """Check that a checkpoint holds what the roles train: the same roles, of whole models or of the same adapters.

    Args:
        checkpoint: its folder.
        roles: that train.
        section: name of the stage.

    Raises:
        ConfigError: other roles train, or `sharing`, `freeze` or a key of `lora` is another.
        CheckpointError: the trunk has other weights.
    """
    saved_roles = read_state(checkpoint).get("roles", {})
    names = [role.name for role in roles]
    if saved_roles and set(saved_roles) != set(names):
        raise ConfigError(
            f"{checkpoint} holds {' and '.join(saved_roles)}, but this run trains {' and '.join(names)} "
            "(ppo.advantage: gae alone has a critic); set it to what the run had, or start a new run"
        )
    for role in roles:
        document = saved_roles.get(role.name, {})
        _check_frozen(checkpoint, role, document.get("frozen", []), section)
        saved = document.get("adapter")
        if (saved is None) == isinstance(role.model, AdaptedModel):
            own, other = ("lora", "full") if saved is None else ("full", "lora")
            raise ConfigError(
                f"{section}.sharing is {own}, but {checkpoint} was made with {other}; set it to that, or start a new "
                "run"
            )
        if not isinstance(role.model, AdaptedModel) or saved is None:
            continue
        now = role.model.adapter.document()
        if different := [name for name in now if now[name] != saved[name]]:
            name = different[0]
            raise ConfigError(
                f"{section}.lora: the {role.name}'s {name} is {now[name]}, in {checkpoint} it is {saved[name]}; set it "
                "to that, or start a new run"
            )
        assert role.model.identity is not None
        check_trunk(f"{checkpoint} ({role.name})", saved["trunk_hash"], role.model.identity)


def _check_frozen(checkpoint: Path, role: TrainableRole, saved: list[str], section: str) -> None:
    """Raise `ConfigError` if other modules of the role trained: their optimizer states are not in the checkpoint."""
    if list(role.model.frozen) != saved:
        key = f"{section}.{role.name}.freeze" if section == "ppo" else f"{section}.freeze"
        raise ConfigError(
            f"{key} is {list(role.model.frozen)}, but {checkpoint} was made with {saved}; set it to that, or start a "
            "new run"
        )
