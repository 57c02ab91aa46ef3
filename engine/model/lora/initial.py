"""The tensors of a new adapter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.hf.loader import TensorSource
from icegrt.model.lora.spec import AdapterSpec, adapter_mapping

SCORE = "score.weight"


class InitialAdapter:
    """The tensors of a new adapter, as `peft` initialises one: A uniform in +- 1 / sqrt(inputs), B zero.

    Each tensor has a seed of its own, so its values depend neither on the layout nor on the other targets.

    Args:
        architecture: of the trunk.
        spec: of the adapter.
        head: of the model; a scalar head is zero unless `base` has one.
        seed: of the run.
        name: of the role, so that two roles begin with other A.
        base: where an existing scalar head comes from; None: from nowhere.
    """

    def __init__(
        self,
        architecture: Architecture,
        spec: AdapterSpec,
        head: HeadKind,
        *,
        seed: int,
        name: str,
        base: TensorSource | None = None,
    ) -> None:
        self.where = f"the new adapter of the {name}"
        self._seed, self._name, self._base = seed, name, base
        self._shapes = {
            tensor: shape
            for entry in adapter_mapping(architecture, spec, head)
            for tensor, shape in zip(entry.sources, entry.shapes, strict=True)
        }
        if base is None or SCORE not in base.names():
            self._shapes.pop(SCORE, None)

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._shapes.keys()

    def get(self, name: str, *slices: slice) -> Tensor:
        """Return a tensor, or a slice of it, fp32."""
        if name == SCORE:
            assert self._base is not None
            return self._base.get(name, *slices)
        shape = self._shapes[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(shape)[slices or (slice(None),)]
        seed = hashlib.sha256(f"{self._seed} {self._name} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little", signed=True))
        bound = 1.0 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)[slices or (slice(None),)]
