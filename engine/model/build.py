"""Build the part of a model that this rank holds, and load a checkpoint's weights into it."""

from __future__ import annotations

from typing import Any

import torch

from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout, check_model
from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.hf import loader
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.lora.model import AdaptedModel
from icegrt.model.lora.spec import AdapterSpec
from icegrt.model.lora.trunk_hash import TrunkIdentity
from icegrt.model.pipeline_model import PipelineModel


def check_parallelism(architecture: Architecture, cluster: Cluster, beside: Architecture | None = None) -> None:
    """Check that the cluster's layout divides the model. Allocates nothing.

    Args:
        architecture: of the model.
        cluster: the process groups.
        beside: the model that `pipeline_split` is for; a model with another number of layers is split evenly. None:
            `architecture` itself.

    Raises:
        ConfigError: heads, MLP width or layers do not divide.
    """
    is_of_split = beside is None or beside.num_layers == architecture.num_layers
    layout = cluster.layout if is_of_split else cluster.layout.for_layers(architecture.num_layers)
    _check(architecture, layout, cluster)


def _check(architecture: Architecture, layout: Layout, cluster: Cluster) -> None:
    check_model(
        layout,
        cluster.world_size,
        layers=architecture.num_layers,
        heads=architecture.num_heads,
        kv_heads=architecture.num_kv_heads,
        ffn=architecture.ffn_size,
    )


def build_parallel_model(
    architecture: Architecture, head: HeadKind, cluster: Cluster, *, dtype: torch.dtype, recompute: str = "none"
) -> PipelineModel:
    """Build this rank's stages under the cluster's layout. Weights are uninitialised.

    A model whose layers `pipeline_split` does not sum to is split evenly: it stands beside the one that the split is
    for, which `check_parallelism` has checked.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    # The stages are Megatron-core modules: this import loads Megatron-core unless `Cluster.open()` has done so.
    from icegrt.model.language_model import LanguageModel

    layout = cluster.layout.for_layers(architecture.num_layers)
    _check(architecture, layout, cluster)
    config = architecture.transformer_config(dtype=dtype, layout=layout, recompute=recompute)
    stages = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else (None,)
    chunks = [LanguageModel(architecture, config, head, stage).to(cluster.device) for stage in stages]
    return PipelineModel(chunks, cluster)


def build_model(
    source: Any,
    head: HeadKind,
    cluster: Cluster,
    *,
    dtype: torch.dtype,
    new_head: bool = False,
    recompute: str = "none",
) -> PipelineModel:
    """Build this rank's stages of a model with the weights of a checkpoint.

    Args:
        source: a Hugging Face folder, a `transformers` model, or an `HFCheckpointReader` of either.
        head: 'lm' or 'scalar'.
        cluster: the open process groups.
        dtype: of all parameters but a scalar head, which is float32.
        new_head: allow a checkpoint without a scalar head; the head is then zero.
        recompute: activation recomputation, 'none', 'selective' or 'full'.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or dtype, or not finite.
        ConfigError: the layout does not divide the model.
    """
    reader = source if isinstance(source, HFCheckpointReader) else HFCheckpointReader(source)
    # Checked before a model is allocated: config.json may name any sizes.
    loader.check(reader, head, new_head=new_head)
    model = build_parallel_model(reader.architecture, head, cluster, dtype=dtype, recompute=recompute)
    loader.load(model, reader)
    return model


def build_parallel_adapter(
    trunk: PipelineModel, spec: AdapterSpec, head: HeadKind, identity: TrunkIdentity | None = None
) -> AdaptedModel:
    """Build an adapter and a head over a trunk. The trunk is frozen; the adapter's weights are uninitialised."""
    from icegrt.model.lora.stage import AdaptedStage

    trunk.requires_grad_(False)
    chunks = [AdaptedStage(chunk, spec, head).to(trunk.cluster.device) for chunk in trunk.chunks]
    return AdaptedModel(trunk, chunks, spec, head, identity)


def build_adapter(
    trunk: PipelineModel,
    spec: AdapterSpec,
    head: HeadKind,
    source: loader.TensorSource,
    identity: TrunkIdentity | None = None,
) -> AdaptedModel:
    """Build an adapter and a head over a trunk with the weights of `source`.

    Args:
        trunk: is frozen, and may be shared with other adapters.
        spec: of the adapter.
        head: 'lm': the trunk's output projection; 'scalar': a head of its own, zero if `source` has none.
        source: a checked `AdapterReader`, or an `InitialAdapter`.
        identity: of the trunk's checkpoint.

    Raises:
        CheckpointError: a tensor is not finite.
    """
    model = build_parallel_adapter(trunk, spec, head, identity)
    loader.load(model, source)
    return model
