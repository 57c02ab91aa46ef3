"""Checkpoints of a run: weights, optimizers and schedules through Megatron's dist_checkpointing, the rest as JSON.

A checkpoint is written aside and renamed, so a folder with a checkpoint's name is always whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.cluster import Cluster
from icegrt.errors import CheckpointError, RunError
from icegrt.roles.role import Role

_NAME = re.compile(r"step_(\d{6,})")
_STATE = "state.json"
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def folder_of(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    folder = folder_of(run_dir)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def save(run_dir: str | Path, step: int, roles: list[Role], state: dict[str, Any], keep: int) -> Path:
    """Write `roles` (the ones that learn) and `state` (JSON), then delete all but the last `keep` checkpoints.

    All ranks call it, with the same step and state; each writes what it holds, to a folder that all of them see.
    """
    from megatron.core import dist_checkpointing

    cluster = Cluster.current()
    target = folder_of(run_dir) / f"step_{step:06d}"
    aside = target.with_name(target.name + ".writing")
    try:
        if cluster.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            for role in roles:
                (aside / role.name).mkdir(parents=True)
        cluster.wait()
        with _quiet(), _results_queue_of_this_process():
            for role in roles:
                role.model.settle()
                _begin_states(role)
                dist_checkpointing.save(_sharded(role, loading=False), str(aside / role.name))
        cluster.wait()
        document = {"step": step, "schedules": {r.name: r.schedule.state_dict() for r in roles}, **state}
        if cluster.is_main:
            (aside / _STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"{target}: the checkpoint cannot be written ({error.strerror or error})") from error
    if cluster.is_main:
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    cluster.wait()
    return target


def load(checkpoint: Path, roles: list[Role]) -> dict[str, Any]:
    """Restore `roles` from a checkpoint; returns the state that was saved with them."""
    from megatron.core import dist_checkpointing

    document = read_state(checkpoint)
    for role in roles:
        folder = checkpoint / role.name
        if not folder.is_dir():
            raise CheckpointError(f"{checkpoint}: holds no {role.name}")
        if role.learns:
            for optimizer in _inner(role.optimizer):
                optimizer._init_optimizer_states_with_dummy_values()
        with _quiet():
            loaded = dist_checkpointing.load(_sharded(role, loading=True), str(folder))
        for chunk, state in zip(role.model.chunks, loaded["model"], strict=True):
            chunk.load_state_dict(state)
        if role.learns:
            _load_optimizer(role, loaded["optimizer"])
            role.schedule.load_state_dict(document["schedules"][role.name])
    return document


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    path = checkpoint / _STATE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from an earlier checkpoint") from None


@contextlib.contextmanager
def _results_queue_of_this_process():
    # Megatron's default is a queue of a manager process, which it spawns: seconds, and a script without a
    # `__main__` guard would run again. Saving here is synchronous, so a plain queue will do.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sharded(role: Role, *, loading: bool) -> dict[str, Any]:
    document: dict[str, Any] = {"model": [chunk.sharded_state_dict() for chunk in role.model.chunks]}
    if role.learns:
        with contextlib.ExitStack() as stack:
            for optimizer in _inner(role.optimizer):
                stack.enter_context(_buckets_in_their_places(optimizer))
            document["optimizer"] = role.optimizer.sharded_state_dict(
                document["model"], is_loading=loading, metadata=_OPTIMIZER_FORMAT
            )
    return document


@contextlib.contextmanager
def _buckets_in_their_places(optimizer):
    # Megatron joins its buckets' states without the padding between them, and then cuts parameters out by offsets that
    # count it: with more than one bucket (a tied embedding over a pipeline, overlapped reduction) all parameters behind
    # the first gap would be saved shifted, with a warning in the log at most.
    joined = optimizer.get_parameter_state_dp_zero

    def spaced(**kwargs):
        found = joined(**kwargs)
        for index, buffer in enumerate(optimizer.buffers if found is not None else ()):
            for states in found[index].values():
                for name in [n for n, state in states.items() if isinstance(state, Tensor)]:
                    states[name] = _spaced(states[name], buffer)
        return found

    optimizer.get_parameter_state_dp_zero = spaced
    try:
        yield
    finally:
        del optimizer.get_parameter_state_dp_zero


def _spaced(state: Tensor, buffer) -> Tensor:
    out = state.new_zeros(buffer.numel)
    parts = state.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        out[bucket.offset : bucket.offset + part.numel()] = part
    return out


def _begin_states(role: Role) -> None:
    # A role that has not stepped yet (the actor, while the critic warms up) has no Adam state, which Megatron cannot
    # save. What torch would begin with is put there; Megatron's own way is a step, and that decays the weights.
    for optimizer in _inner(role.optimizer):
        adam = optimizer.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if isinstance(adam, torch.optim.Adam) and not adam.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **zeros}


def _load_optimizer(role: Role, state: dict[str, Any]) -> None:
    for optimizer in _inner(role.optimizer):
        optimizer._set_main_param_and_optimizer_states = _setter(optimizer)
    role.optimizer.load_state_dict(state)
    for optimizer in _inner(role.optimizer):
        del optimizer._set_main_param_and_optimizer_states
        # All parameters come back sharing one step tensor, which Adam then advances once per parameter.
        for entry in optimizer.optimizer.state.values():
            entry["step"] = entry["step"].clone()


def _inner(optimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _setter(optimizer):
    # Megatron's own writes keys that torch's AdamW does not hand it; only those given are copied.
    def set_states(model_param, tensors) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        place = {"param": main, **optimizer.optimizer.state[main]}
        with torch.no_grad():
            for name, value in tensors.items():
                place[name].copy_(value)

    return set_states
