"""Hugging Face checkpoints in and out, tensor by tensor.

`layout()` lists every parameter of a model once: its name here, its names there, and how the one is made of the other.
Import, export and the checks for missing or unexpected tensors all read that list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from icegrt.errors import CheckpointError
from icegrt.model.architecture import Architecture
from icegrt.model.language_model import HeadKind, LanguageModel
from icegrt.model.pretrained import Pretrained

# How a parameter is cut over tensor-parallel ranks: not at all, by rows, by columns, by groups of query heads with
# their key and value, or the halves of gate and up each by rows.
Cut = Literal["whole", "rows", "columns", "qkv", "gate_up"]


@dataclass(frozen=True)
class Entry:
    """One parameter: `name` in icegrt, `sources` in Hugging Face, and how it is cut."""

    name: str
    sources: tuple[str, ...]
    cut: Cut = "whole"


def layout(architecture: Architecture, head: HeadKind) -> Iterator[Entry]:
    """Every parameter of a model with this head, in the order of the forward pass."""
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows")
    for layer in range(architecture.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield Entry(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",))
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        yield Entry(f"{ours}.self_attention.linear_qkv.weight", qkv, "qkv")
        yield Entry(f"{ours}.self_attention.linear_proj.weight", (f"{theirs}.self_attn.o_proj.weight",), "columns")
        yield Entry(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
        yield Entry(f"{ours}.mlp.linear_fc1.weight", gate_up, "gate_up")
        yield Entry(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), "columns")
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",))
    if head == "scalar":
        yield Entry("head.weight", ("score.weight",))
    elif not architecture.tied_embeddings:
        yield Entry("head.weight", ("lm_head.weight",), "rows")


def join(entry: Entry, parts: list[Tensor], architecture: Architecture) -> Tensor:
    """Hugging Face's tensors -> Megatron's, whole. Query heads are stored beside the key and value they share."""
    if entry.cut == "qkv":
        groups, dim = architecture.num_kv_heads, architecture.head_dim
        shaped = [part.reshape(groups, -1, dim, *part.shape[1:]) for part in parts]
        return torch.cat(shaped, dim=1).flatten(0, 2)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def separate(entry: Entry, whole: Tensor, architecture: Architecture) -> list[Tensor]:
    """The inverse of `join`."""
    if entry.cut == "qkv":
        groups, dim = architecture.num_kv_heads, architecture.head_dim
        queries = architecture.num_heads // groups
        shaped = whole.reshape(groups, queries + 2, dim, *whole.shape[1:])
        return [part.flatten(0, 2) for part in shaped.split([queries, 1, 1], dim=1)]
    return list(whole.chunk(len(entry.sources)))


def shard(entry: Entry, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """This tensor-parallel rank's piece of a whole Megatron tensor."""
    if ranks == 1 or entry.cut == "whole":
        return whole
    if entry.cut == "columns":
        return whole.chunk(ranks, dim=1)[rank]
    if entry.cut == "gate_up":
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks)[rank]


@torch.no_grad()
def load(model: LanguageModel, source: Pretrained, *, new_head: bool = False) -> None:
    """Copy a checkpoint into `model`, one tensor at a time.

    `new_head=True` lets a missing scalar head be zero; otherwise a missing tensor is an error, as is a tensor that no
    parameter takes, or one of another shape. Raises `CheckpointError` naming the tensor.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    parameters = dict(model.named_parameters())
    available = set(source.names())
    for entry in layout(model.architecture, model.head_kind):
        parameter = parameters.pop(entry.name)
        missing = [name for name in entry.sources if name not in available]
        if missing:
            if entry.name == "head.weight" and model.head_kind == "scalar" and new_head:
                parameter.zero_()
                continue
            raise CheckpointError(_missing_message(source, missing[0]))
        available.difference_update(entry.sources)
        parts = [source.get(name) for name in entry.sources]
        expected = _source_shapes(entry, parameter.shape, ranks, model.architecture)
        for name, part, shape in zip(entry.sources, parts, expected, strict=True):
            if part.shape != shape:
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` has shape {tuple(part.shape)} where config.json asks for "
                    f"{tuple(shape)}"
                )
        piece = shard(entry, join(entry, parts, model.architecture), rank, ranks)
        parameter.copy_(piece)
    assert not parameters, f"parameters without a source: {sorted(parameters)}"
    _refuse_leftovers(source, available, model.head_kind)


def _source_shapes(entry: Entry, piece: torch.Size, ranks: int, architecture: Architecture) -> list[torch.Size]:
    """Shapes in Hugging Face of the tensors that a parameter of shape `piece` on each rank is made of."""
    whole = list(piece)
    if entry.cut != "whole":
        whole[entry.cut == "columns"] *= ranks
    return [part.shape for part in separate(entry, torch.empty(whole, device="meta"), architecture)]


def _missing_message(source: Pretrained, name: str) -> str:
    if name == "score.weight":
        return (
            f"{source.where}: no value head (`score.weight`). This is a language model, not a reward model: train one "
            "with `icegrt reward`, or choose a new head explicitly (`ppo.critic.init=actor`)"
        )
    return f"{source.where}: tensor `{name}` is missing"


def _refuse_leftovers(source: Pretrained, names: set[str], head: HeadKind) -> None:
    # The other kind of head is left behind knowingly; rope tables of old checkpoints are computed here.
    expected = {"lm_head.weight"} if head == "scalar" else {"score.weight"}
    expected |= {"lm_head.weight"} if source.architecture.tied_embeddings else set()
    leftovers = sorted(n for n in names - expected if not n.endswith("rotary_emb.inv_freq"))
    if leftovers:
        raise CheckpointError(
            f"{source.where}: {len(leftovers)} tensor(s) that this architecture does not have, first `{leftovers[0]}`"
        )


@torch.no_grad()
def export_tensors(model: LanguageModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under their Hugging Face names, one at a time, on the CPU, in `dtype`."""
    parameters = dict(model.named_parameters())
    for entry in layout(model.architecture, model.head_kind):
        parts = separate(entry, parameters[entry.name].detach(), model.architecture)
        for name, part in zip(entry.sources, parts, strict=True):
            yield name, part.to("cpu", dtype, copy=True).contiguous()
