"""Responses over data-parallel ranks: each draws its own, and afterwards every rank knows them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from icegrt.distributed.cluster import Cluster
from icegrt.packing import Share
from icegrt.rollout.types import FinishReason, Response

_REASONS: tuple[FinishReason, ...] = ("stop", "length")
T = TypeVar("T")
_HEADER = 4  # prompt, sample, tokens, reason


def mine(items: Sequence[T], share: Share) -> list[T]:
    """This data-parallel rank's neighbouring part, so that samples of one prompt mostly stay together."""
    return list(items[len(items) * share.rank // share.ranks : len(items) * (share.rank + 1) // share.ranks])


def everyones(
    responses: Sequence[Response], prompts: Sequence[list[int]], samples: int, first_sequence_id: int
) -> list[Response]:
    """The responses of all data-parallel ranks, ordered by prompt and sample. A collective.

    Twelve bytes per token and response travel at most: token ids and log-probs, four bytes each, and a header.
    """
    cluster = Cluster.current()
    found = list(responses)
    if cluster.share.ranks > 1:
        parts = cluster.gather(_as_numbers(found))
        found = [r for part in parts for r in _from_numbers(part, prompts, samples, first_sequence_id)]
    return sorted(found, key=lambda r: (r.prompt_index, r.sample))


def _as_numbers(responses: list[Response]) -> Tensor:
    headers = [(r.prompt_index, r.sample, len(r.tokens), _REASONS.index(r.finish_reason)) for r in responses]
    tokens = [t for r in responses for t in r.tokens]
    logprobs = torch.tensor([x for r in responses for x in r.logprobs], dtype=torch.float32)
    return torch.cat(
        [
            torch.tensor([len(responses)], dtype=torch.int32),
            torch.tensor(headers, dtype=torch.int32).flatten(),
            torch.tensor(tokens, dtype=torch.int32),
            logprobs.view(torch.int32),
        ]
    )


def _from_numbers(
    numbers: Tensor, prompts: Sequence[list[int]], samples: int, first_sequence_id: int
) -> Iterator[Response]:
    count = int(numbers[0])
    headers = numbers[1 : 1 + _HEADER * count].view(count, _HEADER).tolist()
    body = numbers[1 + _HEADER * count :]
    lengths = [length for _, _, length, _ in headers]
    tokens, logprobs = body[: sum(lengths)].split(lengths), body[sum(lengths) :].view(torch.float32).split(lengths)
    for (prompt, sample, _, reason), token_n, logprob_n in zip(headers, tokens, logprobs, strict=True):
        yield Response(
            prompt,
            sample,
            first_sequence_id + prompt * samples + sample,
            prompts[prompt],
            token_n.tolist(),
            logprob_n.tolist(),
            _REASONS[reason],
        )
