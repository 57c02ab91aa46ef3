"""Changes of a configuration that lower its peak of device memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from icegrt.config import PPOConfig
from icegrt.distributed.layout import Layout, check_model
from icegrt.errors import ConfigError
from icegrt.model.architecture import Architecture
from icegrt.utils.files import model_folder

_HALVINGS = 3  # of the token budget


@dataclass(frozen=True)
class Change:
    """A change of one kind.

    Attributes:
        axis: the kind: "recompute", "token budget", "KV cache", "residency", "sharing", "tensor" or "pipeline".
        keys: dotted keys of the `ppo` section, each with its new value.
    """

    axis: str
    keys: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return " ".join(f"ppo.{name}={_text(value)}" for name, value in self.keys)


@dataclass(frozen=True)
class Cluster:
    """What the run has.

    Attributes:
        gpus: ranks of the run.
        gpus_per_node: tensor parallelism stays within a node.
        longest: tokens of the longest sequence, which a micro-batch must hold.
    """

    gpus: int
    gpus_per_node: int
    longest: int


def changes_of(config: PPOConfig, cluster: Cluster) -> dict[str, list[Change]]:
    """Return the changes that a configuration leaves, by axis; those of an axis from the mildest to the strongest.

    The axes come in the order in which they are tried: first those that cost computation, then those that move bytes.
    """
    return {axis: found for axis, levels in _AXES.items() if (found := [*levels(config, cluster)])}


def apply(config: PPOConfig, changes: Sequence[Change]) -> PPOConfig:
    """Return the configuration with the keys of the changes.

    Raises:
        ConfigError: a value is refused.
    """
    for change in changes:
        for name, value in change.keys:
            config = _with_key(config, name.split("."), value)
    return config


def _with_key(config: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    return dataclasses.replace(config, **{first: _with_key(getattr(config, first), rest, value) if rest else value})


def _recompute(config: PPOConfig, cluster: Cluster) -> Iterator[Change]:
    for level in _above(("none", "selective", "full"), config.run.recompute):
        yield Change("recompute", (("run.recompute", level),))


def _token_budget(config: PPOConfig, cluster: Cluster) -> Iterator[Change]:
    for halvings in range(1, _HALVINGS + 1):
        budget = config.token_budget >> halvings
        if budget < cluster.longest:
            break
        yield Change("token budget", (("token_budget", budget),))


def _kv_cache(config: PPOConfig, cluster: Cluster) -> Iterator[Change]:
    # A share of the free memory always fits.
    kv_memory = config.rollout.kv_memory
    if not isinstance(kv_memory, float) or kv_memory > 1:
        yield Change("KV cache", (("rollout.kv_memory", 0.9),))


def _sharing(config: PPOConfig, cluster: Cluster) -> Iterator[Change]:
    # The critic is an adapter on the actor's checkpoint, so it cannot start from a reward model of its own.
    if config.sharing == "full":
        critic = (("critic.init", "actor"),) if config.has_critic else ()
        yield Change("sharing", (("sharing", "lora"), *critic))


def _residency(config: PPOConfig, cluster: Cluster) -> Iterator[Change]:
    for level in _above(("none", "optimizer", "all"), config.offload.roles):
        yield Change("residency", (("offload.roles", level),))


def _tensor(config: PPOConfig, cluster: Cluster) -> Iterator[Change]:
    size = 2 * config.parallel.tensor
    while size <= min(cluster.gpus_per_node, cluster.gpus):
        if _divides(config, cluster, tensor=size):
            yield Change("tensor", (("parallel.tensor", size), ("parallel.sequence_parallel", True)))
        size *= 2


def _pipeline(config: PPOConfig, cluster: Cluster) -> Iterator[Change]:
    if config.parallel.pipeline_split:
        return
    size = 2 * config.parallel.pipeline
    while size <= cluster.gpus:
        if _divides(config, cluster, pipeline=size):
            yield Change("pipeline", (("parallel.pipeline", size),))
        size *= 2


def _divides(config: PPOConfig, cluster: Cluster, **sizes: int) -> bool:
    """Return whether a layout divides the GPUs and the actor."""
    layout = dataclasses.replace(Layout.of(config.parallel), **sizes)
    model = Architecture.from_pretrained(model_folder(config.actor))
    try:
        check_model(
            layout,
            cluster.gpus,
            layers=model.num_layers,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            ffn=model.ffn_size,
        )
    except ConfigError:
        return False
    return cluster.gpus % layout.model == 0


_AXES: dict[str, Callable[[PPOConfig, Cluster], Iterator[Change]]] = {
    "KV cache": _kv_cache,
    "token budget": _token_budget,
    "recompute": _recompute,
    "residency": _residency,
    "sharing": _sharing,
    "tensor": _tensor,
    "pipeline": _pipeline,
}
AXES = tuple(_AXES)


def _above(levels: Sequence[str], level: str) -> Sequence[str]:
    return levels[levels.index(level) + 1 :]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
