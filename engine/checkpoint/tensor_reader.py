"""Single parameters out of a run's checkpoint, without a model, a process group or a GPU.

Megatron's dist_checkpointing writes PyTorch's distributed checkpoints: every parameter under its global shape, whatever
the layout that trained it, with the layers of the trunk stacked along a leading dimension.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from icegrt.checkpoint.safe_unpickle import Reader, in_words
from icegrt.errors import CheckpointError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Megatron saves the norm before a linear layer under the name that it has where Transformer Engine fuses the two.
_SAVED_AS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_REMEDY = "remove this checkpoint to use the one before it"


class CheckpointTensors:
    """The parameters of one role in a checkpoint. `folder`: the role's folder in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = Reader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, name: str) -> Tensor:
        """One parameter, whole, by its name in the model, in the dtype it was saved in."""
        layer = _LAYER.fullmatch(name)
        key = f"decoder.layers.{_SAVED_AS.get(layer[2], layer[2])}" if layer else name
        saved = self._metadata.state_dict_metadata.get(key)
        if not isinstance(saved, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: holds no `{key}`; {_REMEDY}")
        first, sizes = [0] * len(saved.size), list(saved.size)
        if layer:
            first[0], sizes[0] = int(layer[1]), 1
        wanted = torch.empty(sizes, dtype=saved.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(first), torch.Size(sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(key, saved, [chunk]))
        try:
            self._reader.read_data(plan, _Into(wanted)).wait()
        except Exception as error:  # a file that is gone or damaged says so in many ways
            raise CheckpointError(f"{self.folder}: `{key}` {in_words(error)}; {_REMEDY}") from None
        return wanted.squeeze(0) if layer else wanted


class _Into(LoadPlanner):
    """Puts what is read in its place of one tensor."""

    def __init__(self, wanted: Tensor) -> None:
        self.wanted = wanted

    def resolve_tensor(self, read_item) -> Tensor:
        place = self.wanted
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(dim, start, length)
        return place

    def commit_tensor(self, read_item, tensor: Tensor) -> None:
        """Nothing is left to do: the place is a view."""

    def load_bytes(self, read_item, value) -> None:
        raise AssertionError("a parameter is never saved as bytes")

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        raise AssertionError("the plan is made by the reader of a single tensor")

    create_local_plan = create_global_plan = finish_plan = set_up_planner
