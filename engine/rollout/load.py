"""A checkpoint opened for generation, without a trainer around it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from icegrt.config import ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import ConfigError
from icegrt.model.architecture import DTYPES
from icegrt.model.build import build_model
from icegrt.model.language_model import LanguageModel


def load_actor(source: str | Path | Any, dtype: str = "fp32", parallel: ParallelConfig | None = None) -> LanguageModel:
    """A language model for `RolloutEngine`, in eval mode and without gradients.

    source: path of a Hugging Face checkpoint, or a `transformers` model, whose weights are copied. dtype: 'fp32' or
    'bf16'. parallel: how the model is cut over the ranks that torchrun started (None: not at all). The process groups
    that it needs stay open for as long as the model is alive. Raises `CheckpointError` for a checkpoint that cannot be
    used, `ConfigError` for another dtype or a layout that does not fit.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"load_actor: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    cluster = Cluster.open(Layout.of(parallel) if parallel is not None else None)
    try:
        model = build_model(source, "lm", dtype=DTYPES[dtype])
    except BaseException as error:
        cluster.close(error)
        raise
    model.requires_grad_(False)
    weakref.finalize(model, cluster.close)
    return model.eval()
