"""The sizes and policies of a rollout engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from icegrt.config import RolloutConfig
from icegrt.errors import ConfigError
from icegrt.rollout.memory import parse_memory


@dataclass(frozen=True)
class RolloutSettings:
    """How a decoder divides its work.

    Args:
        max_batch: sequences that a rank decodes together.
        kv_memory: memory of the KV cache: up to 1 a share of what is free, above 1 bytes, or a text such as "20GiB".
        block_size: tokens of a block of the cache, a power of two.
        token_budget: most rows of a step; longer prompts are computed in parts.
        order: which waiting request starts first.
        reuse_prefixes: whether requests reuse cached blocks with the same tokens.
        lookahead: steps that are planned before the one before is complete, so that a device does not wait for the
            host. 0 or 1; None: 1 on a GPU.
        cuda_graphs: whether decode steps are captured as CUDA graphs.

    Raises:
        ConfigError: a value is out of bounds.
    """

    max_batch: int = 256
    kv_memory: float | str = 0.9
    block_size: int = 16
    token_budget: int = 2048
    order: Literal["first_come", "longest_remaining"] = "first_come"
    reuse_prefixes: bool = True
    lookahead: int | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        parse_memory(self.kv_memory)
        if self.max_batch < 1 or self.token_budget < 1:
            raise ConfigError(f"rollout: max_batch and token_budget must be at least 1, got {self}")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"rollout.block_size must be a power of two, got {self.block_size}")
        if self.lookahead not in (None, 0, 1):
            raise ConfigError(f"rollout: lookahead must be 0, 1 or None, got {self.lookahead}")

    @classmethod
    def of(cls, config: RolloutConfig, max_batch: int) -> RolloutSettings:
        """Return the settings of a configuration section."""
        return cls(
            max_batch,
            config.kv_memory,
            config.block_size,
            config.token_budget,
            config.order,
            config.reuse_prefixes,
            cuda_graphs=config.cuda_graphs,
        )
