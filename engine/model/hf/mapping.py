"""The mapping between Megatron's parameters and the tensors of a Hugging Face checkpoint.

`parameter_mapping()` lists every parameter of a model once, with its Megatron name and its Hugging Face names and
shapes. `shard_slices()` lists the slices of those tensors that form a tensor-parallel rank's parameter. Import, export
and the checks of names and shapes use these two functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from icegrt.model.architecture import Architecture, HeadKind

# How a parameter is partitioned over tensor-parallel ranks: replicated, replicated with its tensors stacked by rows, by
# rows, by rows of the padded vocabulary, by columns, by groups of query heads with their key and value, or gate and up
# each by rows.
Partition = Literal["replicated", "stacked", "rows", "vocabulary", "columns", "qkv", "gate_up"]
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a model.

    Attributes:
        name: its name in Megatron's modules; layers count from the first stage on.
        sources: the names of its Hugging Face tensors.
        shapes: their shapes.
        partition: how it is partitioned over tensor-parallel ranks.
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    partition: Partition = "replicated"

    @property
    def is_replicated(self) -> bool:
        """Whether every tensor-parallel rank has the whole parameter."""
        return self.partition in ("replicated", "stacked")


@dataclass(frozen=True)
class ShardSlice:
    """A slice of a Hugging Face tensor, and its offset in a rank's parameter.

    Attributes:
        source: index of the tensor in `ParameterSpec.sources`.
        dim: the sliced dimension, of tensor and parameter.
        start: first index in the tensor.
        stop: end index in the tensor.
        offset: first index in the parameter.
    """

    source: int
    dim: int
    start: int
    stop: int
    offset: int

    def of(self, parameter: Tensor) -> Tensor:
        """Return the slice's part of the parameter, as a view."""
        return parameter.narrow(self.dim, self.offset, self.stop - self.start)


def parameter_mapping(architecture: Architecture, head: HeadKind) -> Iterator[ParameterSpec]:
    """Yield every parameter of a model with this head, in the order of the forward pass."""
    a = architecture
    vocabulary = ((a.vocab_size, a.hidden_size),)
    yield ParameterSpec(EMBEDDING, ("model.embed_tokens.weight",), vocabulary, "vocabulary")
    for layer in range(a.num_layers):
        yield from _layer(a, f"decoder.layers.{layer}", f"model.layers.{layer}")
    yield ParameterSpec("decoder.final_layernorm.weight", ("model.norm.weight",), ((a.hidden_size,),))
    if head == "scalar":
        yield ParameterSpec("head.weight", ("score.weight",), ((1, a.hidden_size),))
    elif not a.tied_embeddings:
        yield ParameterSpec("head.weight", ("lm_head.weight",), vocabulary, "vocabulary")


def _layer(a: Architecture, layer: str, hf_layer: str) -> Iterator[ParameterSpec]:
    hidden, ffn = a.hidden_size, a.ffn_size
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention = f"{hf_layer}.self_attn"
    yield ParameterSpec(f"{layer}.input_layernorm.weight", (f"{hf_layer}.input_layernorm.weight",), ((hidden,),))
    names = tuple(f"{attention}.{part}_proj" for part in "qkv")
    shapes = ((queries, hidden), (keys, hidden), (keys, hidden))
    yield ParameterSpec(f"{layer}.self_attention.linear_qkv.weight", tuple(f"{n}.weight" for n in names), shapes, "qkv")
    if a.qkv_bias:
        rows = tuple(shape[:1] for shape in shapes)
        yield ParameterSpec(f"{layer}.self_attention.linear_qkv.bias", tuple(f"{n}.bias" for n in names), rows, "qkv")
    if a.family.qk_norm:
        for part in "qk":
            norm = f"{layer}.self_attention.{part}_layernorm.weight"
            yield ParameterSpec(norm, (f"{attention}.{part}_norm.weight",), ((a.head_dim,),))
    projection = ((hidden, queries),)
    yield ParameterSpec(
        f"{layer}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), projection, "columns"
    )
    if a.projection_bias:
        yield ParameterSpec(f"{layer}.self_attention.linear_proj.bias", (f"{attention}.o_proj.bias",), ((hidden,),))
    yield ParameterSpec(
        f"{layer}.pre_mlp_layernorm.weight", (f"{hf_layer}.post_attention_layernorm.weight",), ((hidden,),)
    )
    gate_up = (f"{hf_layer}.mlp.gate_proj.weight", f"{hf_layer}.mlp.up_proj.weight")
    yield ParameterSpec(f"{layer}.mlp.linear_fc1.weight", gate_up, ((ffn, hidden),) * 2, "gate_up")
    yield ParameterSpec(
        f"{layer}.mlp.linear_fc2.weight", (f"{hf_layer}.mlp.down_proj.weight",), ((hidden, ffn),), "columns"
    )


def source_shapes(architecture: Architecture, head: HeadKind) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all Hugging Face tensors, in the order of `parameter_mapping()`."""
    specs = parameter_mapping(architecture, head)
    return {name: shape for spec in specs for name, shape in zip(spec.sources, spec.shapes, strict=True)}


def shard_slices(
    spec: ParameterSpec, architecture: Architecture, rank: int = 0, ranks: int = 1
) -> Iterator[ShardSlice]:
    """Yield the slices of a parameter on tensor-parallel rank `rank` of `ranks`.

    Rows that pad the vocabulary belong to no slice.
    """
    rows = spec.shapes[0][0]
    if spec.partition == "replicated":
        yield ShardSlice(0, 0, 0, rows, 0)
    elif spec.partition == "stacked":
        for source in range(len(spec.sources)):
            yield ShardSlice(source, 0, 0, rows, source * rows)
    elif spec.partition == "rows":
        yield ShardSlice(0, 0, rank * (rows // ranks), (rank + 1) * (rows // ranks), 0)
    elif spec.partition == "columns":
        size = spec.shapes[0][1] // ranks
        yield ShardSlice(0, 1, rank * size, (rank + 1) * size, 0)
    elif spec.partition == "gate_up":
        size = rows // ranks
        for source in range(2):
            yield ShardSlice(source, 0, rank * size, (rank + 1) * size, source * size)
    elif spec.partition == "vocabulary":
        size = architecture.padded_vocab_size(ranks) // ranks
        yield ShardSlice(0, 0, min(rank * size, rows), min((rank + 1) * size, rows), 0)
    else:
        yield from _qkv_slices(architecture, rank, ranks)


def _qkv_slices(a: Architecture, rank: int, ranks: int) -> Iterator[ShardSlice]:
    # Megatron stores the query heads of a group next to their shared key and value, and divides the rows of all groups
    # evenly. With fewer groups than ranks a boundary falls inside a group.
    queries = a.num_heads // a.num_kv_heads * a.head_dim
    size = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim // ranks
    low, high = rank * size, (rank + 1) * size
    row = 0  # of the stacked groups
    for group in range(a.num_kv_heads):
        for source, length in enumerate((queries, a.head_dim, a.head_dim)):
            start, stop = max(row, low), min(row + length, high)
            if start < stop:
                shift = group * length - row
                yield ShardSlice(source, 0, start + shift, stop + shift, start - low)
            row += length
