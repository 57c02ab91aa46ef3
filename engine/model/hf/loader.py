"""Check a Hugging Face checkpoint against an architecture, and copy it into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from icegrt.errors import CheckpointError
from icegrt.model.architecture import HeadKind
from icegrt.model.hf.mapping import EMBEDDING, ParameterSpec, ShardSlice, parameter_mapping, shard_slices
from icegrt.model.hf.value_head import TRL_BIAS
from icegrt.utils.console import warn

if TYPE_CHECKING:
    from icegrt.model.hf.reader import HFCheckpointReader
    from icegrt.model.pipeline_model import PipelineModel


class TensorSource(Protocol):
    """Tensors by name: a checkpoint, an adapter of `peft`, or a new adapter."""

    where: str

    def names(self) -> Iterable[str]: ...

    def get(self, name: str, *slices: slice) -> Tensor: ...


_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Elements of a checkpoint tensor per read: they bound the memory beside the model.
_BLOCK_ELEMENTS = 1 << 22


def check(source: HFCheckpointReader, head: HeadKind, *, new_head: bool = False) -> None:
    """Compare names, shapes and dtypes of all tensors with `config.json`. Reads no tensor but the bias of a value head.

    Args:
        source: the checkpoint.
        head: 'lm' or 'scalar', the head of the model to load.
        new_head: allow a missing scalar head.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected, or of another shape or dtype.
    """
    names = set(source.names())
    for spec in parameter_mapping(source.architecture, head):
        for name, shape in zip(spec.sources, spec.shapes, strict=True):
            if name not in names:
                if name == "score.weight" and new_head:
                    continue
                raise CheckpointError(_missing_message(source, name))
            names.discard(name)
            saved_shape, dtype = source.describe(name)
            if saved_shape != shape:
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` has shape {saved_shape} where config.json asks for {shape}"
                )
            if dtype not in _FLOATS:
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` is of dtype {dtype}; only {', '.join(_FLOATS)} can be read"
                )
    _refuse_leftovers(source, names, head)
    if head == "scalar" and TRL_BIAS in names and (bias := float(source.get(TRL_BIAS))):
        warn(
            f"{source.where}: the value head's bias of {bias:.4g} is not imported, as heads have none here: values are "
            "off by it until the critic has learned it"
        )


def _missing_message(source: HFCheckpointReader, name: str) -> str:
    if name == "score.weight":
        return (
            f"{source.where}: no value head (`score.weight`). This is a language model, not a reward model: train one "
            "with `icegrt reward`, or choose a new head explicitly (`ppo.critic.init=actor`, or `ppo.critic.new_head` "
            "for a checkpoint of the critic's own)"
        )
    if name == "lm_head.weight" and "score.weight" in source.names():
        return (
            f"{source.where}: a reward model or critic (it has `score.weight` and no `lm_head.weight`), not a language "
            "model: it scores answers and cannot write any; name the actor's checkpoint"
        )
    return f"{source.where}: tensor `{name}` is missing; copy the checkpoint again, or fix config.json"


def _refuse_leftovers(source: HFCheckpointReader, names: set[str], head: HeadKind) -> None:
    # The head of the other kind is not loaded; rope tables of old checkpoints are computed from config.json.
    expected = {"lm_head.weight", TRL_BIAS} if head == "scalar" else {"score.weight", TRL_BIAS}
    if source.architecture.tied_embeddings and head == "lm" and "lm_head.weight" in names:
        _refuse_untied(source)
        expected.add("lm_head.weight")
    leftovers = sorted(n for n in names - expected if not n.endswith("rotary_emb.inv_freq"))
    if leftovers:
        raise CheckpointError(
            f"{source.where}: {len(leftovers)} tensor(s) that this architecture does not have, first `{leftovers[0]}`"
        )


def _refuse_untied(source: HFCheckpointReader) -> None:
    embedding, output = ("model.embed_tokens.weight", "lm_head.weight")
    equal = source.describe(embedding) == source.describe(output)
    step = 4096
    for start in range(0, source.architecture.vocab_size if equal else 0, step):
        rows = slice(start, min(start + step, source.architecture.vocab_size))
        equal = equal and torch.equal(source.get(embedding, rows), source.get(output, rows))
    if not equal:
        raise CheckpointError(
            f"{source.where}: `tie_word_embeddings` is true, but `{output}` is not `{embedding}`; set it to false in "
            "config.json, or remove the tensor"
        )


@torch.no_grad()
def load(model: PipelineModel, source: TensorSource) -> None:
    """Copy this rank's shards of a checked checkpoint into `model`, block by block.

    A scalar head that the checkpoint lacks becomes zero.

    Raises:
        CheckpointError: names a tensor that is not finite.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    pending = dict(model.named_parameters())
    tied_copy = pending.pop("head.weight") if model.holds_tied_copy else None
    available = set(source.names())
    for spec in model.parameter_mapping():
        targets = [pending.pop(spec.name)] if spec.name in pending else []
        if tied_copy is not None and spec.name == EMBEDDING:
            targets.append(tied_copy)
        for parameter in targets:
            if available.issuperset(spec.sources):
                read_into(parameter, spec, source, list(shard_slices(spec, model.architecture, rank, ranks)))
            else:  # a new head: after the check no other tensor can be missing
                parameter.zero_()
    assert not pending, f"parameters without a source: {sorted(pending)}"


def read_into(parameter: Tensor, spec: ParameterSpec, source: TensorSource, slices: list[ShardSlice]) -> None:
    """Copy the slices of a parameter from a checkpoint, a block of rows per read."""
    if spec.partition == "vocabulary":
        parameter[slices[0].stop - slices[0].start :].zero_()  # padding
    for shard_slice in slices:
        target, name = shard_slice.of(parameter), spec.sources[shard_slice.source]
        rows_per_block = max(1, _BLOCK_ELEMENTS // math.prod(target.shape[1:]))
        for first in range(0, target.shape[0], rows_per_block):
            last = min(first + rows_per_block, target.shape[0])
            rows, columns = slice(shard_slice.start + first, shard_slice.start + last), slice(None)
            if shard_slice.dim == 1:
                rows, columns = slice(first, last), slice(shard_slice.start, shard_slice.stop)
            block = source.get(name, *(rows, columns)[: target.dim()])
            if not all(x.isfinite() for x in block.aminmax()):
                raise CheckpointError(
                    f"{source.where}: tensor `{name}` holds NaN or infinity; copy the checkpoint again, or go back to "
                    "one from before its training broke"
                )
            target[first:last].copy_(block)
