"""The part of a model that one rank holds: one pipeline stage, or several virtual stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from icegrt.distributed.cluster import Cluster
from icegrt.kernels import VocabShard
from icegrt.model.architecture import Architecture, HeadKind
from icegrt.model.hf import exporter
from icegrt.model.hf.mapping import ParameterSpec, parameter_mapping
from icegrt.model.lora.spec import AdapterSpec

if TYPE_CHECKING:
    from icegrt.model.language_model import LanguageModel
    from icegrt.model.lora.stage import AdaptedStage


class PipelineModel:
    """The pipeline stages of one model that this rank holds. Roles and rollouts work with this class.

    Heads and logits belong to the last stage of the pipeline; use them on the last pipeline rank only.

    Args:
        chunks: the stages in the order of the forward pass. There is one unless stages are interleaved.
        cluster: the process groups that the stages were built for.

    Attributes:
        architecture: sizes and family of the whole model.
        head_kind: 'lm' or 'scalar'.
        config: Megatron's TransformerConfig, shared by all chunks.
        weights_version: number of changes of the weights. A rollout recomputes keys and values of older weights.
        adapter: what the model adds to a trunk that others may share; None: it is a model of its own.
        frozen: kinds of modules that do not train although the model does (`roles.freezing`).
    """

    adapter: AdapterSpec | None = None
    frozen: tuple[str, ...] = ()

    def __init__(self, chunks: Sequence[LanguageModel | AdaptedStage], cluster: Cluster) -> None:
        self.chunks = list(chunks)
        self.cluster = cluster
        self.architecture: Architecture = self.chunks[-1].architecture
        self.head_kind: HeadKind = self.chunks[-1].head_kind
        self.config: Any = self.chunks[-1].config
        self.weights_version = 0
        self._read_hooks: list[Callable[[], None]] = []

    # -- parameters ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def layer_indices(self) -> list[int]:
        """Indices in the whole model of the layers that this rank holds, in the order of the forward pass."""
        return [layer.layer_number - 1 for chunk in self.chunks for layer in chunk.decoder.layers]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over this rank's parameters."""
        for chunk in self.chunks:
            yield from chunk.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over this rank's parameters under the names of `parameter_mapping()`: layers count from the first
        stage on."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
                yield ".".join(parts), parameter

    @property
    def holds_tied_copy(self) -> bool:
        """Whether this rank's head is a second copy of the embedding of an earlier stage."""
        return self.chunks[-1].holds_tied_copy

    def parameter_mapping(self) -> Iterator[ParameterSpec]:
        """Yield the parameters of the whole model, with their tensors of a Hugging Face checkpoint."""
        return parameter_mapping(self.architecture, self.head_kind)

    def export_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors of a Hugging Face checkpoint of the model, on the CPU of rank 0. Collective."""
        return exporter.export_tensors(self, dtype)

    def mark_weights_changed(self) -> None:
        """Count a change of the weights. Roles and checkpoints do; call it after a change by other means."""
        self.weights_version += 1

    def register_read_hook(self, hook: Callable[[], None]) -> None:
        """Register what makes the parameters readable, such as the pending parameter all-gather of an optimizer."""
        self._read_hooks.append(hook)

    def wait_for_param_gather(self) -> None:
        """Bring the parameters to the device and wait for an overlapped parameter all-gather.

        Call it before reading parameters outside a forward pass.
        """
        for hook in self._read_hooks:
            hook()

    # -- modes -----------------------------------------------------------------------------------------------------

    def requires_grad_(self, requires_grad: bool = True) -> PipelineModel:
        """Switch gradients of all parameters on or off. Returns the model."""
        for chunk in self.chunks:
            chunk.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> PipelineModel:
        """Put all chunks into training mode. Returns the model."""
        for chunk in self.chunks:
            chunk.train(mode)
        return self

    def eval(self) -> PipelineModel:
        """Put all chunks into evaluation mode. Returns the model."""
        return self.train(False)

    # -- the last stage --------------------------------------------------------------------------------------------

    @property
    def head(self) -> nn.Module:
        """The `ScalarHead` or `LMHead` of the last stage."""
        return self.chunks[-1].head

    @property
    def lm_weight_VH(self) -> Tensor:
        """The output projection, [V / TP, H]."""
        return self.chunks[-1].lm_weight_VH

    def lm_weight_and_grad(self) -> tuple[Tensor, Tensor | None]:
        """Return the output projection for a loss, [V / TP, H], and the fp32 buffer for its gradient or None."""
        return self.chunks[-1].lm_weight_and_grad()

    @property
    def vocab_shard(self) -> VocabShard | None:
        """This rank's slice of the vocabulary; None if this rank holds all of it and every id counts."""
        return self.chunks[-1].vocab_shard

    @property
    def vocab_limit(self) -> int:
        """The number of ids that count: all ids of the vocabulary, or those of `limit_vocabulary`."""
        return self.chunks[-1].vocab_limit

    def limit_vocabulary(self, size: int) -> None:
        """Leave ids >= `size` out of sampling, log-probs and losses: no text has them. A larger size changes nothing.

        Many checkpoints pad the vocabulary beyond the tokenizer. Sampling and log-probs share the limit, so that the
        policy that is trained is the one that was sampled.
        """
        for chunk in self.chunks:
            chunk.vocab_limit = min(size, self.architecture.vocab_size)

    def gather_hidden_rows(self, hidden_T1H: Tensor) -> Tensor:
        """Return the last stage's hidden states as complete rows, [T, H], on every tensor-parallel rank."""
        return self.chunks[-1].gather_hidden_rows(hidden_T1H)

    def scale_head(self, factor: float) -> None:
        """Multiply all later outputs of a scalar head by `factor`. A rank without a head does nothing."""
        self.chunks[-1].scale_head(factor)
