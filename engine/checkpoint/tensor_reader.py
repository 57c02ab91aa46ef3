"""Read single parameters of a run's checkpoint, without a model, a process group or a GPU.

Megatron's dist_checkpointing writes PyTorch's distributed checkpoints. Every parameter has its global shape in every
layout, and the layers of the trunk are stacked along a leading dimension.
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
# Megatron 0.16: saves the norm before a linear layer under the name of Transformer Engine's fused layer.
_SAVED_AS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_REMEDY = "remove this checkpoint to use the one before it"


class CheckpointTensors:
    """The parameters of one role in a checkpoint.

    Args:
        folder: the role's folder in the checkpoint.

    Raises:
        CheckpointError: the metadata cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = Reader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, name: str) -> Tensor:
        """Return one complete parameter, in the dtype of the checkpoint.

        Args:
            name: its name in `parameter_mapping()`.

        Raises:
            CheckpointError: it is missing, or its file is damaged.
        """
        layer = _LAYER.fullmatch(name)
        key = f"decoder.layers.{_SAVED_AS.get(layer[2], layer[2])}" if layer else name
        saved = self._metadata.state_dict_metadata.get(key)
        if not isinstance(saved, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: holds no `{key}`; {_REMEDY}")
        offsets, sizes = [0] * len(saved.size), list(saved.size)
        if layer:
            offsets[0], sizes[0] = int(layer[1]), 1
        tensor = torch.empty(sizes, dtype=saved.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(key, saved, [chunk]))
        try:
            self._reader.read_data(plan, _CopyInto(tensor)).wait()
        except Exception as error:  # torch raises many types for missing and damaged files
            raise CheckpointError(f"{self.folder}: `{key}` {in_words(error)}; {_REMEDY}") from None
        return tensor.squeeze(0) if layer else tensor


class _CopyInto(LoadPlanner):
    """Copies what torch reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item) -> Tensor:
        view = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item, tensor: Tensor) -> None:
        """Do nothing: `resolve_tensor` returned a view of the target."""

    def load_bytes(self, read_item, value) -> None:
        raise AssertionError("a parameter is never saved as bytes")

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        raise AssertionError("the plan is made by the reader of a single tensor")

    create_local_plan = create_global_plan = finish_plan = set_up_planner
