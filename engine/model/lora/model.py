"""A model that is an adapter and a head over a trunk, which other models may share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icegrt.model.architecture import HeadKind
from icegrt.model.hf import exporter
from icegrt.model.hf.mapping import ParameterSpec, parameter_mapping
from icegrt.model.lora.spec import AdapterSpec, adapter_mapping
from icegrt.model.lora.trunk_hash import TrunkIdentity
from icegrt.model.pipeline_model import PipelineModel

if TYPE_CHECKING:
    from icegrt.model.lora.stage import AdaptedStage


class AdaptedModel(PipelineModel):
    """An adapter, and a head, over the frozen trunk of another `PipelineModel`.

    Its parameters are those of the adapter and of its own head. The trunk's parameters belong to the trunk, and the
    output projection of a language model too.

    Args:
        trunk: the model whose stages it uses.
        chunks: its own stages.
        adapter: what the adapter is.
        head: 'lm' or 'scalar'.
        identity: of the trunk's checkpoint; None: it is not known, and adapters cannot be saved.
    """

    adapter: AdapterSpec

    def __init__(
        self,
        trunk: PipelineModel,
        chunks: list[AdaptedStage],
        adapter: AdapterSpec,
        head: HeadKind,
        identity: TrunkIdentity | None = None,
    ) -> None:
        super().__init__(chunks, trunk.cluster)
        self.trunk, self.adapter, self.identity = trunk, adapter, identity
        assert self.head_kind == head

    def parameter_mapping(self) -> Iterator[ParameterSpec]:
        """Yield the parameters of adapter and head, with their tensors of `peft`'s format."""
        return adapter_mapping(self.architecture, self.adapter, self.head_kind)

    @torch.no_grad()
    def export_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of the merged model, W + scale * B A, on the CPU of rank 0. Collective.

        Products and sums are fp32, and rounded to `dtype` once.
        """
        adapter = dict(exporter.export_tensors(self, torch.float32))
        specs = parameter_mapping(self.architecture, self.trunk.head_kind)
        trunk_specs = [spec for spec in specs if spec.name != "head.weight" or self.head_kind == "lm"]
        for name, tensor in exporter.export_tensors(self.trunk, torch.float32, specs=trunk_specs):
            yield name, merged(tensor, name, adapter, self.adapter).to(dtype)
        if "score.weight" in adapter:
            yield "score.weight", adapter["score.weight"].to(dtype)


def merged(weight: Tensor, name: str, adapter: dict[str, Tensor], spec: AdapterSpec) -> Tensor:
    """Return a tensor of the trunk plus the adapter's product, in fp32; the tensor itself if it has no adapter.

    Args:
        weight: [out, in] fp32.
        name: its Hugging Face name.
        adapter: the adapter's tensors under their names, fp32.
        spec: of the adapter.
    """
    module = name.removesuffix(".weight")
    if f"{module}.lora_A.weight" not in adapter:
        return weight
    return weight + spec.scale * (adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"])
