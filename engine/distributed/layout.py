"""How ranks are divided over a model. An impossible layout is an error that names the nearest possible ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from icegrt.config import ParallelConfig
from icegrt.errors import ConfigError

_SUGGESTIONS = 3


@dataclass(frozen=True)
class Layout:
    """Tensor, pipeline and virtual pipeline sizes; data parallelism takes the remaining factor of the world size.

    Attributes:
        tensor: tensor-parallel size, in ranks.
        pipeline: pipeline-parallel size, in ranks.
        virtual_pipeline: stages per pipeline rank.
        sequence_parallel: whether tensor-parallel ranks share the rows between their layers.
        pipeline_split: layers of each stage in the order of the forward pass; empty splits evenly.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence_parallel: bool = False
    pipeline_split: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: ParallelConfig) -> Layout:
        """Return the layout of a configuration section.

        Raises:
            ConfigError: keys contradict each other.
        """
        layout = cls(
            config.tensor,
            config.pipeline,
            config.virtual_pipeline,
            # Megatron 0.16: warns at tensor-parallel size 1 -> we switch the flag off.
            config.sequence_parallel and config.tensor > 1,
            tuple(config.pipeline_split),
        )
        if layout.virtual_pipeline > 1 and layout.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline is {layout.virtual_pipeline}, but parallel.pipeline is 1: stages can only "
                "be interleaved over several ranks"
            )
        if layout.pipeline_split and len(layout.pipeline_split) != layout.stages:
            raise ConfigError(
                f"parallel.pipeline_split has {len(layout.pipeline_split)} entries for {layout.stages} stages "
                f"(pipeline {layout.pipeline} x virtual_pipeline {layout.virtual_pipeline})"
            )
        if any(layers < 1 for layers in layout.pipeline_split):
            raise ConfigError(f"parallel.pipeline_split {list(layout.pipeline_split)}: every stage needs a layer")
        return layout

    def for_layers(self, layers: int) -> Layout:
        """Return the layout of a model with `layers` layers: split evenly if `pipeline_split` is for another number."""
        return self if sum(self.pipeline_split) == layers else replace(self, pipeline_split=())

    @property
    def model(self) -> int:
        """Number of ranks that hold one model."""
        return self.tensor * self.pipeline

    @property
    def stages(self) -> int:
        """Number of pipeline stages, virtual stages included."""
        return self.pipeline * self.virtual_pipeline

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline}"


def check_world_size(layout: Layout, world_size: int) -> None:
    """Check that the layout divides the world size.

    Raises:
        ConfigError: it does not.
    """
    if world_size % layout.model == 0:
        return
    multiple = math.ceil(world_size / layout.model) * layout.model
    if world_size == 1:
        raise ConfigError(
            f"{layout} needs {layout.model} ranks, and this process is the only one. Start it with torchrun "
            f"--nproc-per-node {layout.model} -m icegrt ..., or set {nearest(layout, 1, lambda _: True)}"
        )
    raise ConfigError(
        f"torchrun started {world_size} ranks, which {layout} ({layout.model} per model) does not divide. Start "
        f"{multiple} ranks, or with {world_size} set {nearest(layout, world_size, lambda _: True)}"
    )


def check_model(layout: Layout, world_size: int, *, layers: int, heads: int, kv_heads: int, ffn: int) -> None:
    """Check that the layout divides a model.

    Raises:
        ConfigError: heads, MLP width or layers do not divide.
    """

    def obstacle(candidate: Layout) -> str | None:
        return _obstacle(candidate, layers, heads, kv_heads, ffn)

    message = obstacle(layout)
    if message is not None:
        raise ConfigError(
            f"{message}. With {world_size} ranks set {nearest(layout, world_size, lambda c: not obstacle(c))}"
        )


def _obstacle(layout: Layout, layers: int, heads: int, kv_heads: int, ffn: int) -> str | None:
    tensor = layout.tensor
    for size, unit in ((heads, "attention heads"), (kv_heads, "key/value heads"), (ffn, "columns of the MLP")):
        if size % tensor:
            return f"parallel.tensor is {tensor}, but the model's {size} {unit} cannot be divided by it"
    if layout.pipeline_split:
        if sum(layout.pipeline_split) != layers:
            split = list(layout.pipeline_split)
            return f"parallel.pipeline_split {split} has {sum(split)} layers, but the model has {layers}"
    elif layers % layout.stages:
        split = f"parallel.pipeline {layout.pipeline}"
        if layout.virtual_pipeline > 1:
            split += f" x parallel.virtual_pipeline {layout.virtual_pipeline}"
        return f"the model's {layers} layers cannot be divided by {split} (parallel.pipeline_split may divide unevenly)"
    return None


def nearest(layout: Layout, world_size: int, valid: Callable[[Layout], bool]) -> str:
    """Return the keys of the valid layouts of this world size that are nearest to `layout`, as text.

    There is always one: a model per rank.
    """

    def distance(candidate: Layout) -> tuple[float, int]:
        ratios = (candidate.tensor / layout.tensor, candidate.pipeline / layout.pipeline)
        return sum(abs(math.log2(ratio)) for ratio in ratios), candidate.model

    candidates = sorted((c for c in _divisions(world_size) if valid(c)), key=distance)[:_SUGGESTIONS]
    return ", or ".join(f"parallel.tensor={c.tensor} parallel.pipeline={c.pipeline}" for c in candidates)


def _divisions(world_size: int) -> Iterator[Layout]:
    for model in (n for n in range(1, world_size + 1) if world_size % n == 0):
        for tensor in (n for n in range(1, model + 1) if model % n == 0):
            yield Layout(tensor, model // tensor)
