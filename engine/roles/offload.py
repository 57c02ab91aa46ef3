"""The state of a role by kind, and its registration for offloading."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor

from icegrt.residency import GRADIENTS, OPTIMIZER, PARAMETERS, HostMemory, Kind, Part, Residency
from icegrt.roles.optimizer import inner_optimizers, wait_for_param_gather
from icegrt.roles.role import Role, TrainableRole


def place(role: Role, residency: Residency, host: HostMemory, kinds: Iterable[Kind], trunk: str | None = None) -> None:
    """Let `residency` decide where the role is; `kinds` of it leave the device while nobody holds them.

    Gradients are not kept: they are zero when they return. A frozen role has parameters only; other kinds are ignored.

    Args:
        role: all of its state is on the device.
        residency: of all roles.
        host: where the state moves.
        kinds: to offload; none: the role stays on the device, but others leave it while this one is held.
        trunk: name of the role whose parameters this one reads beside its own; None: of none.
    """
    # A strong reference would close a cycle, and roles would outlive their run until the garbage collector comes.
    reference: weakref.ref[Any] = weakref.ref(role)
    for kind in kinds:
        if kind == PARAMETERS or isinstance(role, TrainableRole):
            tensors = _Parameters(reference) if kind == PARAMETERS else partial(_of_role, _TENSORS[kind], reference)
            version = None if kind == GRADIENTS else partial(_of_role, attrgetter("weight_changes"), reference)
            residency.add(role.name, kind, Part(f"{role.name}: {kind}", tensors, host, version))
    role.placement.residency, role.placement.trunk = residency, trunk


def _of_role(read: Callable[[Any], Any], reference: weakref.ref[Any]) -> Any:
    return read(reference())


class _Parameters:
    """Returns the parameters of a role, complete: an overlapped all-gather may be due after an optimizer step.

    Later passes must not change them while the version of their copy on the host stays the same.
    """

    def __init__(self, reference: weakref.ref[Any]) -> None:
        self.reference = reference
        self.complete_at = reference().weight_changes

    def __call__(self) -> Iterable[Tensor]:
        role = self.reference()
        if isinstance(role, TrainableRole) and self.complete_at != role.weight_changes:
            wait_for_param_gather(role.ddps)
            self.complete_at = role.weight_changes
        return role.model.parameters()


def _gradient_buffers(role: TrainableRole) -> Iterable[Tensor]:
    return [buffer.grad_data for ddp in role.ddps for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]


def _optimizer_state(role: TrainableRole) -> Iterable[Tensor]:
    """Return fp32 master weights and moments. Adam's counts of steps stay where they are."""
    # Without a dtype to convert, Megatron's master weights are views of the parameters.
    weights = {parameter.untyped_storage()._cdata for parameter in role.model.parameters()}
    tensors: list[Tensor] = []
    for inner in inner_optimizers(role.optimizer):
        adam = inner.optimizer
        mains = (main for group in adam.param_groups for main in group["params"])
        tensors += (main for main in mains if main.untyped_storage()._cdata not in weights)
        tensors += (x for state in adam.state.values() for x in state.values() if isinstance(x, Tensor) and x.dim())
    return tensors


_TENSORS: dict[Kind, Callable[[Any], Iterable[Tensor]]] = {GRADIENTS: _gradient_buffers, OPTIMIZER: _optimizer_state}
