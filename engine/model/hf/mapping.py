"""Hugging Face checkpoints in and out, tensor by tensor.

`layout()` lists every parameter of a model once: its name here, its names and shapes there. `pieces()` says which part
of which source a tensor-parallel rank's parameter is made of. Import, export and the checks for missing, unexpected or
misshapen tensors all read these two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icegrt.errors import CheckpointError
from icegrt.model.architecture import Architecture

if TYPE_CHECKING:
    from icegrt.model.hf.reader import Pretrained
    from icegrt.model.language_model import HeadKind, LanguageModel

# How a parameter is cut over tensor-parallel ranks: not at all, by rows of the padded vocabulary, by columns, by groups
# of query heads with their key and value, or the halves of gate and up each by rows.
Cut = Literal["whole", "vocabulary", "columns", "qkv", "gate_up"]
_EMBEDDING = "embedding.word_embeddings.weight"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Elements of a source that are read at once: beside them only the model takes memory.
_BLOCK = 1 << 22


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


def separate(entry: Entry, shards: Tensor | Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
    """A Megatron tensor, whole or as all ranks' shards in order -> the tensors of Hugging Face that it is made of."""
    shards = [shards] if isinstance(shards, Tensor) else shards
    return [_source(entry, index, shards, architecture) for index in range(len(entry.sources))]


def _source(entry: Entry, index: int, shards: Sequence[Tensor], architecture: Architecture) -> Tensor:
    parts = [
        (piece, shard)
        for rank, shard in enumerate(shards)
        for piece in pieces(entry, architecture, rank, len(shards))
        if piece.source == index
    ]
    if len(parts) == 1:  # it lies in one place
        piece, shard = parts[0]
        return piece.of(shard)
    whole = torch.empty(entry.shapes[index], dtype=shards[0].dtype, device=shards[0].device)
    for piece, shard in parts:
        whole.narrow(piece.dim, piece.start, piece.stop - piece.start).copy_(piece.of(shard))
    return whole


def check(source: Pretrained, head: HeadKind, *, new_head: bool = False) -> None:
    """Compare names, shapes and dtypes of all tensors with what `config.json` asks for, before any is read.

    Raises `CheckpointError` naming the first tensor that is missing, of another shape or dtype, or left over.
    """
    names = set(source.names())
    for entry in layout(source.architecture, head):
        for name, shape in zip(entry.sources, entry.shapes, strict=True):
            if name not in names:
                if name == "score.weight" and new_head:
                    continue
                raise CheckpointError(_missing_message(source, name))
            names.discard(name)
            found, dtype = source.describe(name)
            if found != shape:
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` has shape {found} where config.json asks for {shape}"
                )
            if dtype not in _FLOATS:
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` is of dtype {dtype}; only {', '.join(_FLOATS)} can be read"
                )
    _refuse_leftovers(source, names, head)


def _missing_message(source: Pretrained, name: str) -> str:
    if name == "score.weight":
        return (
            f"{source.where}: no value head (`score.weight`). This is a language model, not a reward model: train one "
            "with `icegrt reward`, or choose a new head explicitly (`ppo.critic.init=actor`)"
        )
    return f"{source.where}: tensor `{name}` is missing; copy the checkpoint again, or mend config.json"


def _refuse_leftovers(source: Pretrained, names: set[str], head: HeadKind) -> None:
    # The other kind of head is left behind knowingly; rope tables of old checkpoints are computed here.
    expected = {"lm_head.weight"} if head == "scalar" else {"score.weight"}
    if source.architecture.tied_embeddings and head == "lm" and "lm_head.weight" in names:
        _refuse_untied(source)
        expected.add("lm_head.weight")
    leftovers = sorted(n for n in names - expected if not n.endswith("rotary_emb.inv_freq"))
    if leftovers:
        raise CheckpointError(
            f"{source.where}: {len(leftovers)} tensor(s) that this architecture does not have, first `{leftovers[0]}`"
        )


def _refuse_untied(source: Pretrained) -> None:
    ours, theirs = ("model.embed_tokens.weight", "lm_head.weight")
    same = source.describe(ours) == source.describe(theirs)
    step = 4096
    for start in range(0, source.architecture.vocab_size if same else 0, step):
        stop = min(start + step, source.architecture.vocab_size)
        rows = slice(start, stop)
        same = same and torch.equal(source.get(ours, rows), source.get(theirs, rows))
    if not same:
        raise CheckpointError(
            f"{source.where}: `tie_word_embeddings` is true, but `{theirs}` is not `{ours}`; set it to false in "
            "config.json, or remove the tensor"
        )


def held_parameters(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The parameters that this rank holds, under the names of `layout()`: layers count over the whole model."""
    held = {}
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            held[".".join(parts)] = parameter
    return held


@torch.no_grad()
def load(model: LanguageModel, source: Pretrained) -> None:
    """Copy a checked checkpoint into `model`: a block of a tensor at a time, and of each only what this rank holds.

    A scalar head that the checkpoint lacks is zero. Raises `CheckpointError` naming a tensor that is not finite.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    held = held_parameters(model)
    tied_copy = held.pop("head.weight") if model.holds_tied_copy else None
    available = set(source.names())
    for entry in layout(model.architecture, model.head_kind):
        targets = [held.pop(entry.name)] if entry.name in held else []
        if tied_copy is not None and entry.name == _EMBEDDING:
            targets.append(tied_copy)
        for parameter in targets:
            if available.issuperset(entry.sources):
                _read_into(parameter, entry, source, list(pieces(entry, model.architecture, rank, ranks)))
            else:  # only a new head can be missing, after the check
                parameter.zero_()
    assert not held, f"parameters without a source: {sorted(held)}"


def _read_into(parameter: Tensor, entry: Entry, source: Pretrained, wanted: list[Piece]) -> None:
    if entry.cut == "vocabulary":
        parameter[wanted[0].stop - wanted[0].start :].zero_()  # padding
    for piece in wanted:
        place, name = piece.of(parameter), entry.sources[piece.source]
        rows_at_once = max(1, _BLOCK // math.prod(place.shape[1:]))
        for first in range(0, place.shape[0], rows_at_once):
            last = min(first + rows_at_once, place.shape[0])
            rows, columns = slice(piece.start + first, piece.start + last), slice(None)
            if piece.dim == 1:
                rows, columns = slice(first, last), slice(piece.start, piece.stop)
            block = source.get(name, *(rows, columns)[: place.dim()])
            if not all(x.isfinite() for x in block.aminmax()):
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` holds NaN or infinity; copy the checkpoint again, or go back to "
                    "one from before its training broke"
                )
            place[first:last].copy_(block)


@torch.no_grad()
def export_tensors(
    model: LanguageModel, dtype: torch.dtype, read: Callable[[nn.Parameter], Tensor] = lambda p: p
) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters (or what `read` finds on them) under their Hugging Face names, on the CPU, in `dtype`.

    One at a time. A collective: every rank iterates to the end, and rank 0 alone is given the tensors.
    """
    for entry, shards in _gathered(model, read):
        yield from exported(entry, shards, model.architecture, dtype)


def _gathered(model: LanguageModel, read: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[Entry, list[Tensor]]]:
    """On rank 0, every entry of the layout with all ranks' shards; the others of its model hand theirs over."""
    from megatron.core import parallel_state

    model.settle()
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    held = {name: read(parameter).detach() for name, parameter in held_parameters(model).items()}
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    pipeline_group = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(pipeline_group)
    if len(stages) == 1 and dist.get_world_size(tensor_group) == 1:
        for entry in layout(model.architecture, model.head_kind):
            yield entry, [held[entry.name]]
        return
    shapes: list[Any] = [None] * len(stages)
    dist.all_gather_object(shapes, {n: (tuple(x.shape), x.dtype) for n, x in held.items()}, group=pipeline_group)
    receives = parallel_state.is_pipeline_first_stage()
    for entry in layout(model.architecture, model.head_kind):
        stage = next(s for s in range(len(stages)) if entry.name in shapes[s])
        if dist.get_rank(pipeline_group) == stage:
            shard = held[entry.name].cpu().contiguous()
            if stage > 0:
                dist.send(shard, stages[0], group=pipeline_group)
        elif receives:
            shape, dtype = shapes[stage][entry.name]
            shard = torch.empty(shape, dtype=dtype)
            dist.recv(shard, stages[stage], group=pipeline_group)
        if receives:
            shards = _shards_on_rank_0(entry, shard, tensor_group)
            if shards is not None:
                yield entry, shards


def _shards_on_rank_0(entry: Entry, shard: Tensor, group: dist.ProcessGroup) -> list[Tensor] | None:
    ranks = dist.get_process_group_ranks(group)
    first = dist.get_rank() == ranks[0]
    if entry.cut == "whole" or len(ranks) == 1:
        return [shard] if first else None
    shards = [torch.empty_like(shard) for _ in ranks] if first else None
    dist.gather(shard, shards, dst=ranks[0], group=group)
    return shards


def exported(
    entry: Entry, shards: Sequence[Tensor], architecture: Architecture, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """One parameter, as the shards of all ranks in order, under its names in Hugging Face, on the CPU, in `dtype`.

    Rows that pad the vocabulary are left behind. A single tensor may be a view of its parameter.
    """
    for index, name in enumerate(entry.sources):
        yield name, _source(entry, index, shards, architecture).to("cpu", dtype)
