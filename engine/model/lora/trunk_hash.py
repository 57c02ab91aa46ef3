"""The hash of a trunk: an adapter is valid on the weights that it was trained on, and on no others."""

from __future__ import annotations

import hashlib

import torch

from icegrt.distributed.cluster import Cluster
from icegrt.model.hf.mapping import source_shapes
from icegrt.model.hf.reader import HFCheckpointReader

# Rows per read: they bound the memory beside the model.
_BLOCK_ROWS = 4096
_HEADS = ("lm_head.weight", "score.weight")


def trunk_hash(reader: HFCheckpointReader, cluster: Cluster) -> str:
    """Return the hash of a checkpoint's trunk: embedding, layers and final norm, without heads. Collective.

    Every rank reads a part of the tensors. The hash depends on their names, shapes, dtypes and bytes alone.
    """
    names = [name for name in source_shapes(reader.architecture, "scalar") if name not in _HEADS]
    digests = {name: _digest(reader, name) for name in names[cluster.rank :: cluster.world_size]}
    parts = cluster.gather_to_main(digests)
    total = None
    if cluster.is_main:
        by_name = {name: digest for part in parts for name, digest in part.items()}
        total = hashlib.sha256("\n".join(f"{name} {by_name[name]}" for name in names).encode()).hexdigest()
    result: str = cluster.broadcast_from_main(total)
    return result


def _digest(reader: HFCheckpointReader, name: str) -> str:
    shape, dtype = reader.describe(name)
    digest = hashlib.sha256(f"{dtype} {shape}".encode())
    for first in range(0, shape[0], _BLOCK_ROWS):
        block = reader.get(name, slice(first, min(first + _BLOCK_ROWS, shape[0])))
        digest.update(block.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
