"""What Megatron's dist_checkpointing and distributed optimizer need around them, to save and load a role rightly."""

from __future__ import annotations

import contextlib
import io
import queue
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.roles.optimizer import inner_optimizers
from icegrt.roles.role import Role

_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}

_NO_SETTING = ("params", "step")


def plan_save(role: Role, folder: Path) -> Any:
    """Megatron's strategy after it has planned: its `writer` knows what this rank writes, `metadata` the whole, and
    `common` is the content of `common.pt`. A collective that writes nothing."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class SavePlan(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer, outcome):
            _, self.metadata, _ = outcome
            self.writer = writer
            return super()._get_save_and_finalize_callbacks(writer, outcome)

    planned = SavePlan("torch_dist", 1, thread_count=1)
    role.model.wait_for_param_gather()
    init_optimizer_states(role)
    with quiet(), _results_queue_of_this_process(), _common_part_kept_by(planned):
        dist_checkpointing.save(sharded(role, loading=False), str(folder), planned, async_sharded_save=True)
    return planned


@contextlib.contextmanager
def _results_queue_of_this_process():
    # Megatron's default is a queue of a manager process, which it spawns: seconds, and a script without a
    # `__main__` guard would run again. Nothing is ever put into this one.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


@contextlib.contextmanager
def _common_part_kept_by(planned):
    # Megatron has rank 0 write it between two collectives, where a full disk would leave the other ranks waiting.
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    class Kept(TorchCommonSaveStrategy):
        def save_common(self, state: dict[str, Any], folder: str | Path) -> None:
            content = io.BytesIO()
            torch.save(state, content)
            planned.common = content.getvalue()

    before = serialization.get_default_save_common_strategy
    serialization.get_default_save_common_strategy = lambda: Kept("torch", 1)
    try:
        yield
    finally:
        serialization.get_default_save_common_strategy = before


@contextlib.contextmanager
def quiet():
    """Without Megatron's and torch's warnings, which nobody can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sharded(role: Role, *, loading: bool) -> dict[str, Any]:
    """What Megatron saves of a role, or loads into it: the model, and the optimizer if the role learns."""
    document: dict[str, Any] = {"model": sharded_model(role)}
    if role.learns:
        with contextlib.ExitStack() as stack:
            for optimizer in inner_optimizers(role.optimizer):
                stack.enter_context(_patched_bucket_offsets(optimizer))
            stack.enter_context(_garbage_left_to_python())
            document["optimizer"] = role.optimizer.sharded_state_dict(
                document["model"], is_loading=loading, metadata=_OPTIMIZER_FORMAT
            )
    return document


def sharded_model(role: Role) -> list[Any]:
    """The model's part of `sharded`, stage by stage of those that this rank holds."""
    return [chunk.sharded_state_dict() for chunk in role.model.chunks]


@contextlib.contextmanager
def _patched_bucket_offsets(optimizer):
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


@contextlib.contextmanager
def _garbage_left_to_python():
    # Megatron collects garbage each time, for programs that have turned the collector off: 0.3 s for every role.
    from megatron.core.optimizer import distrib_optimizer

    before = distrib_optimizer.gc
    distrib_optimizer.gc = types.SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        distrib_optimizer.gc = before


def _spaced(state: Tensor, buffer) -> Tensor:
    out = state.new_zeros(buffer.numel)
    parts = state.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        out[bucket.offset : bucket.offset + part.numel()] = part
    return out


def init_optimizer_states(role: Role) -> None:
    """Give parameters that no step has reached the state that torch would begin with."""
    # Megatron cannot save a role without (the actor, while the critic warms up). Its own way is a step, and that decays
    # the weights.
    for optimizer in inner_optimizers(role.optimizer):
        adam = optimizer.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if isinstance(adam, torch.optim.Adam) and not adam.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **zeros}


def allocate_optimizer_states(role: Role) -> None:
    """Give the optimizer states that a load can write to."""
    for optimizer in inner_optimizers(role.optimizer):
        optimizer._init_optimizer_states_with_dummy_values()


def load_optimizer(role: Role, state: dict[str, Any]) -> None:
    """Master weights, moments and steps, as `sharded(role, loading=True)` came back; after `allocate_optimizer_states`.

    Settings (betas, decay, learning rates) stay what the configuration says.
    """
    settings = [{k: v for k, v in group.items() if k not in _NO_SETTING} for group in role.optimizer.param_groups]
    for optimizer in inner_optimizers(role.optimizer):
        optimizer._set_main_param_and_optimizer_states = _setter(optimizer)
    role.optimizer.load_state_dict(state)
    for group, configured in zip(role.optimizer.param_groups, settings, strict=True):
        group.update(configured)
    for optimizer in inner_optimizers(role.optimizer):
        del optimizer._set_main_param_and_optimizer_states
        # All parameters come back sharing one step tensor, which Adam then advances once per parameter. (Where apex or
        # Transformer Engine are installed Megatron takes their Adam, which counts steps by group.)
        for entry in optimizer.optimizer.state.values():
            if "step" in entry:
                entry["step"] = entry["step"].clone()


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
