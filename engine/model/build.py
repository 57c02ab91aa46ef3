"""Build what a rank holds of a model, and give it a checkpoint's weights."""

from __future__ import annotations

from typing import Any

import torch

from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import check_model
from icegrt.model.architecture import Architecture
from icegrt.model.hf import loader
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.language_model import HeadKind, LanguageModel


def check_parallelism(architecture: Architecture) -> None:
    """Raises `ConfigError` where the layout of the open cluster cannot cut such a model; costs nothing."""
    cluster = Cluster.current()
    check_model(
        cluster.layout,
        cluster.world_size,
        layers=architecture.num_layers,
        heads=architecture.num_heads,
        kv_heads=architecture.num_kv_heads,
        ffn=architecture.ffn_size,
    )


def build_parallel_model(
    architecture: Architecture, head: HeadKind, *, dtype: torch.dtype, recompute: str = "none"
) -> LanguageModel:
    """What this rank holds of a model under the layout of the open cluster, with weights that are not set yet.

    Raises `ConfigError` where the architecture cannot be cut that way.
    """
    check_parallelism(architecture)
    cluster = Cluster.current()
    layout = cluster.layout
    config = architecture.transformer_config(dtype=dtype, layout=layout, recompute=recompute)
    stages = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else (None,)
    chunks = [LanguageModel(architecture, config, head, stage).to(cluster.device) for stage in stages]
    for index, layer in enumerate(layer for chunk in chunks for layer in chunk.decoder.layers):
        layer.self_attention.core_attention.layer = index
    for chunk in chunks:
        chunk.chunks = chunks
    return chunks[-1]


def build_model(
    source: Any, head: HeadKind, *, dtype: torch.dtype, new_head: bool = False, recompute: str = "none"
) -> LanguageModel:
    """What this rank holds of a model, a `LanguageModel`, with a checkpoint's weights.

    `head`: 'lm' or 'scalar'; `new_head`: a missing one is zero; `recompute`: as the key of that name.
    """
    reader = source if isinstance(source, HFCheckpointReader) else HFCheckpointReader(source)
    # Before memory is taken for a model: the sizes in config.json may be anyone's.
    loader.check(reader, head, new_head=new_head)
    model = build_parallel_model(reader.architecture, head, dtype=dtype, recompute=recompute)
    loader.load(model, reader)
    return model
