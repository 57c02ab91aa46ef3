"""Open a checkpoint for generation, without a trainer."""

from __future__ import annotations

import weakref
from typing import Literal

from icegrt.config import ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import ConfigError
from icegrt.model.architecture import DTYPES
from icegrt.model.build import build_model, check_parallelism
from icegrt.model.hf.reader import HFCheckpointReader, ModelSource
from icegrt.model.pipeline_model import PipelineModel
from icegrt.utils.cpu import warn_of_slow_bf16


def load_actor(
    source: ModelSource, dtype: Literal["fp32", "bf16"] = "fp32", parallel: ParallelConfig | None = None
) -> PipelineModel:
    """Load a language model for `RolloutEngine`, in evaluation mode and without gradients.

    The process groups stay open for the life of the model.

    Args:
        source: a Hugging Face folder, or a `transformers` model, whose weights are copied.
        dtype: 'fp32' or 'bf16'.
        parallel: the layout over the ranks that torchrun started; None holds a whole model on every rank.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: unknown dtype, or a layout that does not divide the model or the ranks.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"load_actor: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    cluster = Cluster.open(Layout.of(parallel) if parallel is not None else None)
    try:
        reader = HFCheckpointReader(source)
        check_parallelism(reader.architecture, cluster)
        warn_of_slow_bf16(DTYPES[dtype], cluster.device, "dtype")
        model = build_model(reader, "lm", cluster, dtype=DTYPES[dtype])
    except BaseException as error:
        cluster.close(error)
        raise
    weakref.finalize(model, cluster.close)
    return model.requires_grad_(False).eval()
