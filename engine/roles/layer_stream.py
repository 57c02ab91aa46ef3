"""Frozen roles whose layers visit the device one after another."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from icegrt.residency import ENDS, PARAMETERS, HostMemory, LayerParts, Part, Residency
from icegrt.roles.role import Role


def stream_layers(role: Role, residency: Residency, host: HostMemory) -> None:
    """Let a forward pass bring the layers of a frozen role to the device, and `residency` its embedding and head.

    Args:
        role: a frozen role, on the device.
        residency: of all roles.
        host: where the parameters move.
    """
    model: weakref.ref[Any] = weakref.ref(role.model)

    def part(name: str, parameters: Iterable[Tensor]) -> Part:
        # The parameters and not their modules: hooks of a module must not refer to it, or it is never freed.
        return Part(f"{role.name}: {name}", list(parameters).copy, host, partial(_weights_version, model))

    modules: list[nn.Module] = [layer for chunk in role.model.chunks for layer in chunk.decoder.layers]
    in_layers = {id(parameter) for module in modules for parameter in module.parameters()}
    ends = [parameter for parameter in role.model.parameters() if id(parameter) not in in_layers]
    residency.add(role.name, ENDS, part(ENDS, ends))
    if modules:
        layers = LayerParts([part(f"layer {n}", module.parameters()) for n, module in enumerate(modules)])
        residency.add(role.name, PARAMETERS, layers)
        for number, module in enumerate(modules):
            module.register_forward_pre_hook(partial(_enter, layers, number))
    role.placement.residency = residency
    role.placement.is_streamed = True


def _weights_version(model: weakref.ref[Any]) -> int:
    return int(model().weights_version)  # type: ignore[union-attr]


def _enter(layers: LayerParts, number: int, module: nn.Module, arguments: Any) -> None:
    layers.enter(number)
