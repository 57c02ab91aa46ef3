"""Workarounds for Megatron's dist_checkpointing and distributed optimizer, to save and load a role."""

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

from icegrt.roles.optimizer import inner_optimizers, is_torch_adam
from icegrt.roles.role import Role

_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}

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
            for optimizer in inner_optimizers(role.optimizer):
                stack.enter_context(_patched_bucket_offsets(optimizer))
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
def _patched_bucket_offsets(optimizer):
    # Megatron 0.16: joins the states of its buckets without their padding, but slices parameters by offsets that count
    # it -> with several buckets (a tied embedding over a pipeline, overlapped reduction) all states behind the first
    # gap are saved shifted. We re-insert the padding.
    get_state = optimizer.get_parameter_state_dp_zero

    def get_padded_state(**kwargs):
        if optimizer.data_parallel_group.size() == 1 and not kwargs["empty_data"]:
            return _states_in_place(optimizer)
        state = get_state(**kwargs)
        for index, buffer in enumerate(optimizer.buffers if state is not None else ()):
            for tensors in state[index].values():
                for name in [n for n, tensor in tensors.items() if isinstance(tensor, Tensor)]:
                    tensors[name] = _with_padding(tensors[name], buffer)
        return state

    optimizer.get_parameter_state_dp_zero = get_padded_state
    try:
        yield
    finally:
        del optimizer.get_parameter_state_dp_zero


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


class _ByRange:
    """States of a buffer's parameters, selected by the parameter's range: what Megatron slices a gathered tensor by."""

    def __init__(self, states: dict[int, Tensor]) -> None:
        self.states = states

    def __getitem__(self, span: slice) -> Tensor:
        return self.states[span.start]


def _states_in_place(optimizer) -> dict[int, Any]:
    # Megatron 0.16: also with one data-parallel rank, it copies states to shards, gathers these and joins them -> 32
    # bytes of host memory per parameter. We return the states themselves.
    document: dict[int, Any] = {}
    for index, (buffer, ranges) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
        by_name: dict[str, dict[int, Tensor]] = {"param": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for parameter, (start, *_) in buffer.param_index_map.items():
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            for name, states in by_name.items():
                states[start] = tensors[name].detach().view(-1)
        document[index] = {dtype: {name: _ByRange(states) for name, states in by_name.items()} for dtype in ranges}
    return document


def _with_padding(state: Tensor, buffer) -> Tensor:
    padded = state.new_zeros(buffer.numel)
    bucket_states = state.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, bucket_state in zip(buffer.buckets, bucket_states, strict=True):
        padded[bucket.offset : bucket.offset + bucket_state.numel()] = bucket_state
    return padded


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
    for optimizer in inner_optimizers(role.optimizer):
        optimizer._set_main_param_and_optimizer_states = _state_setter(optimizer)
    with _steps_as_counted(role):
        role.optimizer.load_state_dict(state)
    for group, configured in zip(role.optimizer.param_groups, settings, strict=True):
        group.update(configured)
    for optimizer in inner_optimizers(role.optimizer):
        del optimizer._set_main_param_and_optimizer_states
        # Megatron 0.16: all parameters share one step tensor after a load -> torch's Adam advances it once per
        # parameter. We clone it. (Adam of apex and Transformer Engine counts steps by group.)
        for entry in optimizer.optimizer.state.values():
            if "step" in entry:
                entry["step"] = entry["step"].clone()


def _state_setter(optimizer):
    # Megatron 0.16: its own setter copies every state of the optimizer, but the `step` of torch's AdamW is not among
    # the loaded tensors -> KeyError. We copy the loaded tensors.
    def set_states(model_param, tensors) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        targets = {"param": main, **optimizer.optimizer.state[main]}
        with torch.no_grad():
            for name, value in tensors.items():
                targets[name].copy_(value)

    return set_states
