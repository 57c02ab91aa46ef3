"""Check a Hugging Face checkpoint against an architecture, and copy it into a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from icegrt.errors import CheckpointError

if TYPE_CHECKING:
    from icegrt.model.hf.reader import HFCheckpointReader
    from icegrt.model.language_model import HeadKind, LanguageModel
from icegrt.model.hf.mapping import _EMBEDDING, ParameterSpec, ShardSlice, parameter_mapping, shard_slices

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


# Elements of a source that are read at once: beside them only the model takes memory.
_BLOCK = 1 << 22


def check(source: HFCheckpointReader, head: HeadKind, *, new_head: bool = False) -> None:
    """Compare names, shapes and dtypes of all tensors with what `config.json` asks for, before any is read.

    Raises `CheckpointError` naming the first tensor that is missing, of another shape or dtype, or left over.
    """
    names = set(source.names())
    for spec in parameter_mapping(source.architecture, head):
        for name, shape in zip(spec.sources, spec.shapes, strict=True):
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


def _missing_message(source: HFCheckpointReader, name: str) -> str:
    if name == "score.weight":
        return (
            f"{source.where}: no value head (`score.weight`). This is a language model, not a reward model: train one "
            "with `icegrt reward`, or choose a new head explicitly (`ppo.critic.init=actor`)"
        )
    return f"{source.where}: tensor `{name}` is missing; copy the checkpoint again, or mend config.json"


def _refuse_leftovers(source: HFCheckpointReader, names: set[str], head: HeadKind) -> None:
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


def _refuse_untied(source: HFCheckpointReader) -> None:
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


def local_parameters(model: LanguageModel) -> dict[str, nn.Parameter]:
    """Return this rank's parameters under the names of `parameter_mapping()`: layers count over the whole model."""
    held = {}
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            held[".".join(parts)] = parameter
    return held


@torch.no_grad()
def load(model: LanguageModel, source: HFCheckpointReader) -> None:
    """Copy a checked checkpoint into `model`: a block of a tensor at a time, and of each only what this rank holds.

    A scalar head that the checkpoint lacks is zero. Raises `CheckpointError` naming a tensor that is not finite.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    held = local_parameters(model)
    tied_copy = held.pop("head.weight") if model.holds_tied_copy else None
    available = set(source.names())
    for spec in parameter_mapping(model.architecture, model.head_kind):
        targets = [held.pop(spec.name)] if spec.name in held else []
        if tied_copy is not None and spec.name == _EMBEDDING:
            targets.append(tied_copy)
        for parameter in targets:
            if available.issuperset(spec.sources):
                read_into(parameter, spec, source, list(shard_slices(spec, model.architecture, rank, ranks)))
            else:  # only a new head can be missing, after the check
                parameter.zero_()
    assert not held, f"parameters without a source: {sorted(held)}"


def read_into(parameter: Tensor, spec: ParameterSpec, source: HFCheckpointReader, wanted: list[ShardSlice]) -> None:
    """Copy slices of a checkpoint's tensors into a parameter of this rank, block by block; padding rows are zero."""
    if spec.partition == "vocabulary":
        parameter[wanted[0].stop - wanted[0].start :].zero_()  # padding
    for shard_slice in wanted:
        place, name = shard_slice.of(parameter), spec.sources[shard_slice.source]
        rows_at_once = max(1, _BLOCK // math.prod(place.shape[1:]))
        for first in range(0, place.shape[0], rows_at_once):
            last = min(first + rows_at_once, place.shape[0])
            rows, columns = slice(shard_slice.start + first, shard_slice.start + last), slice(None)
            if shard_slice.dim == 1:
                rows, columns = slice(first, last), slice(shard_slice.start, shard_slice.stop)
            block = source.get(name, *(rows, columns)[: place.dim()])
            if not all(x.isfinite() for x in block.aminmax()):
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` holds NaN or infinity; copy the checkpoint again, or go back to "
                    "one from before its training broke"
                )
            place[first:last].copy_(block)
