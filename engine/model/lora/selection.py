"""Which adapter a stage of a trunk adds to its products."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from icegrt.model.lora.spec import LINEARS

if TYPE_CHECKING:
    from icegrt.model.lora.stage import StageAdapter


class AdapterSelection:
    """The adapter that a stage of a trunk uses in its next passes.

    A switch assigns one attribute: nothing is copied. It must not change between a forward pass and its backward pass,
    because recomputed layers read it again.

    Attributes:
        selected: None: the trunk alone.
    """

    def __init__(self) -> None:
        self.selected: StageAdapter | None = None
        self._is_attached = False

    def attach(self, layers: nn.ModuleList) -> None:
        """Add the selected adapter's products to those of the layers. Calling it twice does nothing."""
        if self._is_attached:
            return
        self._is_attached = True
        for index, layer in enumerate(layers):
            for linear in LINEARS:
                layer.get_submodule(linear).register_forward_hook(partial(self._add, index, linear))

    def _add(self, index: int, linear: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        product = None if self.selected is None else self.selected.layers[index].products.get(linear)
        if product is None:
            return output
        y: Tensor
        y, bias = output
        return product(inputs[0], y), bias
