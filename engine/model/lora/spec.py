"""What an adapter is: its rank, scale and projections, and the mapping of its parameters to the tensors of `peft`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from icegrt.config import LoRAConfig
from icegrt.errors import ConfigError
from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.hf.mapping import ParameterSpec

# Megatron's linear layers, in the order of use, with the projections that each of them computes in one product.
LINEARS: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
# Linear layers whose input is sharded over tensor-parallel ranks; the others' output is.
ROW_PARALLEL = ("self_attention.linear_proj", "mlp.linear_fc2")
TARGETS = tuple(part for parts in LINEARS.values() for part in parts)
_HF_MODULES = {"self_attention": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True)
class AdapterSpec:
    """Rank, scale and projections of an adapter.

    Attributes:
        rank: rows of every A, columns of every B.
        alpha: numerator of the scale.
        targets: names of projections, in the order of `TARGETS`.
        rslora: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False

    @classmethod
    def of(cls, config: LoRAConfig, key: str) -> AdapterSpec:
        """Read a configuration.

        Args:
            config: the section.
            key: its name in error messages.

        Raises:
            ConfigError: a target is unknown, or there is none.
        """
        unknown = [name for name in config.target_modules if name not in TARGETS]
        if unknown or not config.target_modules:
            given = f"`{unknown[0]}` is no projection that can get an adapter" if unknown else "the list is empty"
            raise ConfigError(f"{key}.target_modules: {given}; name some of {', '.join(TARGETS)}")
        return cls(config.rank, config.alpha, _in_order(config.target_modules), config.use_rslora)

    @property
    def scale(self) -> float:
        """The factor of the adapters' products."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def parts(self, linear: str) -> tuple[str, ...]:
        """Return the projections of one of `LINEARS` that have an adapter."""
        return tuple(part for part in LINEARS[linear] if part in self.targets)

    @property
    def widest(self) -> int:
        """The most columns that x A^T has over the projections of one linear layer."""
        return self.rank * max(len(self.parts(linear)) for linear in LINEARS)

    def document(self) -> dict[str, object]:
        """Return the attributes as JSON."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets), "rslora": self.rslora}

    @classmethod
    def from_document(cls, document: dict) -> AdapterSpec:
        """Return the specification that `document()` describes."""
        return cls(document["rank"], document["alpha"], _in_order(document["targets"]), document["rslora"])


def _in_order(targets: list[str]) -> tuple[str, ...]:
    return tuple(name for name in TARGETS if name in targets)


def projection_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every projection."""
    a = architecture
    hidden, ffn, queries, keys = a.hidden_size, a.ffn_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    inputs_and_outputs = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    return inputs_and_outputs


def adapter_mapping(architecture: Architecture, spec: AdapterSpec, head: HeadKind) -> Iterator[ParameterSpec]:
    """Yield every parameter of an adapter, and its scalar head, in the order of the forward pass.

    The projections of one linear layer have their A in one parameter, stacked by rows, and a B each. Names of tensors
    are those of `peft` without its prefix `base_model.model.`.
    """
    shapes = projection_shapes(architecture)
    for layer in range(architecture.num_layers):
        for linear in LINEARS:
            parts = spec.parts(linear)
            if not parts:
                continue
            name, row_parallel = f"decoder.layers.{layer}.{linear}", linear in ROW_PARALLEL
            modules = [tensor_name(layer, part) for part in parts]
            yield ParameterSpec(
                f"{name}.lora_A",
                tuple(f"{module}.lora_A.weight" for module in modules),
                tuple((spec.rank, shapes[part][1]) for part in parts),
                "columns" if row_parallel else "stacked",
            )
            for part, module in zip(parts, modules, strict=True):
                yield ParameterSpec(
                    f"{name}.lora_B_{part}",
                    (f"{module}.lora_B.weight",),
                    ((shapes[part][0], spec.rank),),
                    "replicated" if row_parallel else "rows",
                )
    if head == "scalar":
        yield ParameterSpec("head.weight", ("score.weight",), ((1, architecture.hidden_size),))


def tensor_name(layer: int, part: str) -> str:
    """Return the Hugging Face name of a projection's module."""
    linear = next(linear for linear, parts in LINEARS.items() if part in parts)
    return f"model.layers.{layer}.{_HF_MODULES[linear.partition('.')[0]]}.{part}"
