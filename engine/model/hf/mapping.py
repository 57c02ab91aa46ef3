"""Hugging Face checkpoints in and out, tensor by tensor.

`parameter_mapping()` lists every parameter of a model once: its name here, its names and shapes there.
`shard_slices()` lists the parts of sources that a tensor-parallel rank's parameter is made of. Import, export and the
checks for missing, unexpected or misshapen tensors all read these two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from icegrt.model.architecture import Architecture

if TYPE_CHECKING:
    from icegrt.model.language_model import HeadKind

# How a parameter is cut over tensor-parallel ranks: not at all, by rows of the padded vocabulary, by columns, by groups
# of query heads with their key and value, or the halves of gate and up each by rows.
Partition = Literal["whole", "vocabulary", "columns", "qkv", "gate_up"]
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: `name` in icegrt, `sources` in Hugging Face with their `shapes`, and how it is cut."""

    name: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    partition: Partition = "whole"


@dataclass(frozen=True)
class ShardSlice:
    """`start` to `stop` of a source along `dim` go to place `at` of a rank's parameter along the same dimension."""

    source: int
    dim: int
    start: int
    stop: int
    at: int

    def of(self, parameter: Tensor) -> Tensor:
        """This piece's place in the parameter, as a view."""
        return parameter.narrow(self.dim, self.at, self.stop - self.start)


def parameter_mapping(architecture: Architecture, head: HeadKind) -> Iterator[ParameterSpec]:
    """Every parameter of a model with this head, in the order of the forward pass; layers count over all stages."""
    a = architecture
    vocabulary = ((a.vocab_size, a.hidden_size),)
    yield ParameterSpec(_EMBEDDING, ("model.embed_tokens.weight",), vocabulary, "vocabulary")
    for layer in range(a.num_layers):
        yield from _layer(a, f"decoder.layers.{layer}", f"model.layers.{layer}")
    yield ParameterSpec("decoder.final_layernorm.weight", ("model.norm.weight",), ((a.hidden_size,),))
    if head == "scalar":
        yield ParameterSpec("head.weight", ("score.weight",), ((1, a.hidden_size),))
    elif not a.tied_embeddings:
        yield ParameterSpec("head.weight", ("lm_head.weight",), vocabulary, "vocabulary")


def _layer(a: Architecture, ours: str, theirs: str) -> Iterator[ParameterSpec]:
    hidden, ffn = a.hidden_size, a.ffn_size
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention = f"{theirs}.self_attn"
    yield ParameterSpec(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), ((hidden,),))
    names = tuple(f"{attention}.{part}_proj" for part in "qkv")
    shapes = ((queries, hidden), (keys, hidden), (keys, hidden))
    yield ParameterSpec(f"{ours}.self_attention.linear_qkv.weight", tuple(f"{n}.weight" for n in names), shapes, "qkv")
    if a.qkv_bias:
        rows = tuple(shape[:1] for shape in shapes)
        yield ParameterSpec(f"{ours}.self_attention.linear_qkv.bias", tuple(f"{n}.bias" for n in names), rows, "qkv")
    if a.family.qk_norm:
        for part in "qk":
            norm = f"{ours}.self_attention.{part}_layernorm.weight"
            yield ParameterSpec(norm, (f"{attention}.{part}_norm.weight",), ((a.head_dim,),))
    projection = ((hidden, queries),)
    yield ParameterSpec(
        f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), projection, "columns"
    )
    if a.projection_bias:
        yield ParameterSpec(f"{ours}.self_attention.linear_proj.bias", (f"{attention}.o_proj.bias",), ((hidden,),))
    yield ParameterSpec(
        f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), ((hidden,),)
    )
    gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
    yield ParameterSpec(f"{ours}.mlp.linear_fc1.weight", gate_up, ((ffn, hidden),) * 2, "gate_up")
    yield ParameterSpec(
        f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), ((hidden, ffn),), "columns"
    )


def source_shapes(architecture: Architecture, head: HeadKind) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the Hugging Face checkpoint, in the order of `parameter_mapping`."""
    specs = parameter_mapping(architecture, head)
    return {name: shape for spec in specs for name, shape in zip(spec.sources, spec.shapes, strict=True)}


def shard_slices(
    spec: ParameterSpec, architecture: Architecture, rank: int = 0, ranks: int = 1
) -> Iterator[ShardSlice]:
    """What tensor-parallel rank `rank` of `ranks` holds of an entry; rows of vocabulary padding belong to no piece."""
    rows = spec.shapes[0][0]
    if spec.partition == "whole":
        yield ShardSlice(0, 0, 0, rows, 0)
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
    # Megatron stores the query heads of a group beside the key and value they share, and cuts the rows of all groups
    # evenly: with fewer groups than ranks through the middle of a group.
    queries = a.num_heads // a.num_kv_heads * a.head_dim
    size = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim // ranks
    low, high = rank * size, (rank + 1) * size
    place = 0
    for group in range(a.num_kv_heads):
        for source, length in enumerate((queries, a.head_dim, a.head_dim)):
            start, stop = max(place, low), min(place + length, high)
            if start < stop:
                offset = group * length - place
                yield ShardSlice(source, 0, start + offset, stop + offset, start - low)
            place += length
