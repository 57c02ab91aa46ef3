"""The hash of a trunk: an adapter is valid on the weights that it was trained on, and on no others.

The hash depends on names, shapes, dtypes and bytes of the checkpoint's tensors alone, not on the layout of a run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from icegrt.distributed.cluster import Cluster
from icegrt.model.hf.mapping import source_shapes
from icegrt.model.hf.reader import HFCheckpointReader

# Rows per read: they bound the memory beside the model.
_BLOCK_ROWS = 4096
_HEADS = ("lm_head.weight", "score.weight")


@dataclass(frozen=True)
class TrunkIdentity:
    """Which weights an adapter belongs to.

    Attributes:
        hash: of the trunk's checkpoint.
        where: its folder, as it was named; empty for a model in memory.
    """

    hash: str
    where: str


def identity_of(reader: HFCheckpointReader, cluster: Cluster | None = None) -> TrunkIdentity:
    """Read all tensors of a checkpoint's trunk, and return its identity: embedding, layers and final norm, no heads.

    Args:
        reader: the checkpoint.
        cluster: every rank reads a part of the tensors; collective. None: this process reads all of them.
    """
    names = [name for name in source_shapes(reader.architecture, "scalar") if name not in _HEADS]
    rank, ranks = (0, 1) if cluster is None else (cluster.rank, cluster.world_size)
    digests = {name: _digest(reader, name) for name in names[rank::ranks]}
    parts = [digests] if cluster is None else cluster.gather_to_main(digests)
    total = None
    if cluster is None or cluster.is_main:
        by_name = {name: digest for part in parts for name, digest in part.items()}
        total = hashlib.sha256("\n".join(f"{name} {by_name[name]}" for name in names).encode()).hexdigest()
    if cluster is not None:
        total = cluster.broadcast_from_main(total)
    return TrunkIdentity(str(total), str(reader.folder or ""))


def _digest(reader: HFCheckpointReader, name: str) -> str:
    shape, dtype = reader.describe(name)
    digest = hashlib.sha256(f"{dtype} {shape}".encode())
    for first in range(0, shape[0], _BLOCK_ROWS):
        block = reader.get(name, slice(first, min(first + _BLOCK_ROWS, shape[0])))
        digest.update(block.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
