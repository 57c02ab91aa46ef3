"""Requests of a decoder: a prompt with its samples, and the checks before they start."""

from __future__ import annotations

from dataclasses import dataclass, field

from icegrt.errors import DataError
from icegrt.model.pipeline_model import PipelineModel
from icegrt.rollout.sequence import Sequence
from icegrt.rollout.types import Response, Sampling


@dataclass(eq=False)
class Request:
    """A prompt that was submitted, with its samples.

    Attributes:
        id: number of the request.
        sequences: its samples.
        responses: the finished ones, in the order in which they finished.
    """

    id: int
    sequences: list[Sequence]
    responses: list[Response] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether all samples are finished; an aborted one is."""
        return all(s.finish_reason is not None for s in self.sequences)


@dataclass
class DecoderStats:
    """Counts since the decoder was built.

    Attributes:
        steps: forward passes.
        rows: rows that they computed, padding aside.
        sampled_tokens: tokens of all sequences.
        kv_tokens_read: tokens whose keys and values attention has read, by layer: those that sequences held.
    """

    steps: int = 0
    rows: int = 0
    sampled_tokens: int = 0
    kv_tokens_read: int = 0


def check_prompt(model: PipelineModel, index: int, prompt: list[int], sampling: Sampling) -> None:
    """Raise `DataError` for a prompt that cannot be answered: empty, beyond the vocabulary or beyond the context."""
    context, vocab_limit = model.architecture.context_length, model.vocab_limit
    if not prompt:
        raise DataError(f"prompt {index} is empty: nothing predicts its first token")
    if not all(0 <= token < vocab_limit for token in (min(prompt), max(prompt))):
        raise DataError(
            f"prompt {index} names token {min(prompt) if min(prompt) < 0 else max(prompt)}, which is not in "
            f"the vocabulary of {vocab_limit} tokens"
        )
    if len(prompt) + sampling.max_new_tokens > context:
        raise DataError(
            f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} that "
            f"exceeds the model's context of {context}"
        )


def check_sampling(model: PipelineModel, sampling: Sampling, has_tokenizer: bool) -> None:
    """Raise `DataError` for settings that name ids beyond the vocabulary, or need a tokenizer that is not there."""
    if sampling.stop and not has_tokenizer:
        raise DataError("sampling.stop needs a tokenizer: build the decoder with to_text")
    named = {*sampling.stop_token_ids, *sampling.logit_bias, *(sampling.allowed_token_ids or ())}
    beyond = sorted(token for token in named if not 0 <= token < model.vocab_limit)
    if beyond:
        raise DataError(
            f"the sampling settings name token {beyond[0]}, which is not in the vocabulary of "
            f"{model.vocab_limit} tokens"
        )


def check_fits(index: int, prompt: list[int], sampling: Sampling, n_blocks: int, block_size: int) -> None:
    """Raise `DataError` for a prompt whose longest response does not fit a KV cache of `n_blocks` blocks."""
    tokens = len(prompt) + sampling.max_new_tokens - 1
    if -(-tokens // block_size) > n_blocks:
        raise DataError(
            f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} it needs "
            f"{tokens} cached tokens, and the KV cache has room for {n_blocks * block_size}. "
            "Raise rollout.kv_memory, or shorten the request"
        )
