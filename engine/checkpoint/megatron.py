"""Workarounds for Megatron's dist_checkpointing and distributed optimizer, to save and load a role."""

from __future__ import annotations

import contextlib
import io
import queue
import types
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from icegrt.checkpoint.optimizer_shards import load_states, sharded_states
from icegrt.roles.optimizer import inner_optimizers, is_torch_adam
from icegrt.roles.role import Role

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}

_NOT_SETTINGS = ("params", "step")  # keys of a parameter group


def plan_save(role: Role, folder: Path) -> Any:
    """Plan which rank writes what. Collective; writes nothing.

    Returns:
        Megatron's save strategy with three more attributes: `writer` (this rank's part of the plan), `metadata` (the
        plan of all ranks) and `common` (content of `common.pt`).
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class SavePlan(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer, outcome):
            _, self.metadata, _ = outcome
            self.writer = writer
            return super()._get_save_and_finalize_callbacks(writer, outcome)

    plan = SavePlan("torch_dist", 1, thread_count=1)
    role.model.wait_for_param_gather()
    init_optimizer_states(role)
    with quiet(), _local_results_queue(), _common_kept_in(plan):
        dist_checkpointing.save(sharded(role, loading=False), str(folder), plan, async_sharded_save=True)
    return plan


@contextlib.contextmanager
def _local_results_queue():
    # Megatron 0.16: spawns a manager process for its results queue -> seconds, and a script without a `__main__` guard
    # runs again. We set a queue of this process, which stays empty.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


@contextlib.contextmanager
def _common_kept_in(plan):
    # Megatron 0.16: rank 0 writes `common.pt` between two collectives -> on a full disk the other ranks wait. We keep
    # the content in memory and write it later.
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    class InMemory(TorchCommonSaveStrategy):
        def save_common(self, state: dict[str, Any], folder: str | Path) -> None:
            content = io.BytesIO()
            torch.save(state, content)
            plan.common = content.getvalue()

    before = serialization.get_default_save_common_strategy
    serialization.get_default_save_common_strategy = lambda: InMemory("torch", 1)
    try:
        yield
    finally:
        serialization.get_default_save_common_strategy = before


@contextlib.contextmanager
def quiet():
    """Ignore warnings of Megatron and torch, about which users can do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sharded(role: Role, *, loading: bool) -> dict[str, Any]:
    """Return the state dict that Megatron saves or loads: the model, and the optimizer if the role learns."""
    document: dict[str, Any] = {"model": sharded_model(role)}
    if role.learns:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_own_shards(role))
            stack.enter_context(_without_garbage_collection())
            stack.enter_context(_steps_as_counted(role))
            document["optimizer"] = role.optimizer.sharded_state_dict(
                document["model"], is_loading=loading, metadata=_OPTIMIZER_FORMAT
            )
    return document


def sharded_model(role: Role) -> list[Any]:
    """Return the model's part of `sharded`, one entry for each stage of this rank."""
    return [chunk.sharded_state_dict() for chunk in role.model.chunks]


@contextlib.contextmanager
def _own_shards(role: Role):
    # Megatron 0.16: see `optimizer_shards`. We replace the functions that save and load the states of parameters.
    optimizers = inner_optimizers(role.optimizer)
    for optimizer in optimizers:
        optimizer.sharded_param_state_fully_reshardable = partial(_sharded_states, optimizer)
        optimizer.load_parameter_state_from_fully_reshardable = partial(load_states, optimizer)
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.sharded_param_state_fully_reshardable
            del optimizer.load_parameter_state_from_fully_reshardable


def _sharded_states(optimizer: Any, sharded_model: Any, is_loading: bool, metadata: Any) -> dict[int, Any]:
    return sharded_states(optimizer, sharded_model)


@contextlib.contextmanager
def _without_garbage_collection():
    # Megatron 0.16: collects garbage explicitly, for programs without automatic collection -> 0.3 s for every role. We
    # replace the collector by a no-op.
    from megatron.core.optimizer import distrib_optimizer

    before = distrib_optimizer.gc
    distrib_optimizer.gc = types.SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        distrib_optimizer.gc = before


@contextlib.contextmanager
def _steps_as_counted(role: Role):
    # Megatron 0.16: reads counts of steps from parameter groups if Transformer Engine or apex is installed -> those of
    # torch's Adam are not saved, and one on the host is torch's. We name the one that counts.
    from megatron.core.optimizer import distrib_optimizer

    before = distrib_optimizer.HAVE_APEX_OR_TE
    distrib_optimizer.HAVE_APEX_OR_TE = not is_torch_adam(role.optimizer)
    try:
        yield
    finally:
        distrib_optimizer.HAVE_APEX_OR_TE = before


def init_optimizer_states(role: Role) -> None:
    """Initialise the Adam states of parameters without a step, as torch's first step would.

    An actor has none while the critic warms up.
    """
    # Megatron 0.16: cannot save an optimizer without states, and creates them by a step -> weight decay changes the
    # weights. We create zeros.
    for optimizer in inner_optimizers(role.optimizer):
        adam = optimizer.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if isinstance(adam, torch.optim.Adam) and not adam.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **zeros}


def allocate_optimizer_states(role: Role) -> None:
    """Allocate the optimizer states into which a load copies, unless they exist."""
    for optimizer in inner_optimizers(role.optimizer):
        if not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()


def load_optimizer(role: Role, state: dict[str, Any]) -> None:
    """Restore master weights, moments and steps; call it after `allocate_optimizer_states`.

    Settings (betas, weight decay, learning rates) stay those of the configuration.

    Args:
        role: a role that learns.
        state: the optimizer's part of a loaded `sharded(role, loading=True)`.
    """
    settings = [{k: v for k, v in group.items() if k not in _NOT_SETTINGS} for group in role.optimizer.param_groups]
    with _own_shards(role), _steps_as_counted(role):
        role.optimizer.load_state_dict(state)
    for group, configured in zip(role.optimizer.param_groups, settings, strict=True):
        group.update(configured)
    for optimizer in inner_optimizers(role.optimizer):
        # Megatron 0.16: all parameters share one step tensor after a load -> torch's Adam advances it once per
        # parameter. We clone it. (Adam of apex and Transformer Engine counts steps by group.)
        for entry in optimizer.optimizer.state.values():
            if "step" in entry:
                entry["step"] = entry["step"].clone()
