"""Hugging Face checkpoints in and out, tensor by tensor.

`layout()` lists every parameter of a model once: its name here, its names and shapes there. `pieces()` says which part
of which source a tensor-parallel rank's parameter is made of. Import, export and the checks for missing, unexpected or
misshapen tensors all read these two.
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
Cut = Literal["whole", "vocabulary", "columns", "qkv", "gate_up"]
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Entry:
    """One parameter: `name` in icegrt, `sources` in Hugging Face with their `shapes`, and how it is cut."""

    name: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    cut: Cut = "whole"


@dataclass(frozen=True)
class Piece:
    """`start` to `stop` of a source along `dim` go to place `at` of a rank's parameter along the same dimension."""

    source: int
    dim: int
    start: int
    stop: int
    at: int

    def of(self, parameter: Tensor) -> Tensor:
        """This piece's place in the parameter, as a view."""
        return parameter.narrow(self.dim, self.at, self.stop - self.start)


def layout(architecture: Architecture, head: HeadKind) -> Iterator[Entry]:
    """Every parameter of a model with this head, in the order of the forward pass; layers count over all stages."""
    a = architecture
    vocabulary = ((a.vocab_size, a.hidden_size),)
    yield Entry(_EMBEDDING, ("model.embed_tokens.weight",), vocabulary, "vocabulary")
    for layer in range(a.num_layers):
        yield from _layer(a, f"decoder.layers.{layer}", f"model.layers.{layer}")
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((a.hidden_size,),))
    if head == "scalar":
        yield Entry("head.weight", ("score.weight",), ((1, a.hidden_size),))
    elif not a.tied_embeddings:
        yield Entry("head.weight", ("lm_head.weight",), vocabulary, "vocabulary")


def _layer(a: Architecture, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, ffn = a.hidden_size, a.ffn_size
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention = f"{theirs}.self_attn"
    yield Entry(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), ((hidden,),))
    names = tuple(f"{attention}.{part}_proj" for part in "qkv")
    shapes = ((queries, hidden), (keys, hidden), (keys, hidden))
    yield Entry(f"{ours}.self_attention.linear_qkv.weight", tuple(f"{n}.weight" for n in names), shapes, "qkv")
    if a.qkv_bias:
        rows = tuple(shape[:1] for shape in shapes)
        yield Entry(f"{ours}.self_attention.linear_qkv.bias", tuple(f"{n}.bias" for n in names), rows, "qkv")
    if a.family.qk_norm:
        for part in "qk":
            norm = f"{ours}.self_attention.{part}_layernorm.weight"
            yield Entry(norm, (f"{attention}.{part}_norm.weight",), ((a.head_dim,),))
    projection = ((hidden, queries),)
    yield Entry(f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), projection, "columns")
    if a.projection_bias:
        yield Entry(f"{ours}.self_attention.linear_proj.bias", (f"{attention}.o_proj.bias",), ((hidden,),))
    yield Entry(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), ((hidden,),))
    gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
    yield Entry(f"{ours}.mlp.linear_fc1.weight", gate_up, ((ffn, hidden),) * 2, "gate_up")
    yield Entry(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), ((hidden, ffn),), "columns")


def source_shapes(architecture: Architecture, head: HeadKind) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the Hugging Face checkpoint, in the order of `layout`."""
    entries = layout(architecture, head)
    return {name: shape for entry in entries for name, shape in zip(entry.sources, entry.shapes, strict=True)}


def pieces(entry: Entry, architecture: Architecture, rank: int = 0, ranks: int = 1) -> Iterator[Piece]:
    """What tensor-parallel rank `rank` of `ranks` holds of an entry; rows of vocabulary padding belong to no piece."""
    rows = entry.shapes[0][0]
    if entry.cut == "whole":
        yield Piece(0, 0, 0, rows, 0)
    elif entry.cut == "columns":
        size = entry.shapes[0][1] // ranks
        yield Piece(0, 1, rank * size, (rank + 1) * size, 0)
    elif entry.cut == "gate_up":
        size = rows // ranks
        for source in range(2):
            yield Piece(source, 0, rank * size, (rank + 1) * size, source * size)
    elif entry.cut == "vocabulary":
        size = architecture.padded_vocab_size(ranks) // ranks
        yield Piece(0, 0, min(rank * size, rows), min((rank + 1) * size, rows), 0)
    else:
        yield from _qkv_pieces(architecture, rank, ranks)


def _qkv_pieces(a: Architecture, rank: int, ranks: int) -> Iterator[Piece]:
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
                yield Piece(source, 0, start + offset, stop + offset, start - low)
            place += length
