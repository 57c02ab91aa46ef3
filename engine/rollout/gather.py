"""Gather responses over data-parallel ranks: each rank samples a part, and every rank receives all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from icegrt.distributed.cluster import Cluster
from icegrt.packing import Share
from icegrt.rollout.types import FinishReason, Response

_REASONS: tuple[FinishReason, ...] = ("stop", "length")
_HEADER = 4  # prompt, sample, tokens, reason
T = TypeVar("T")


def rank_slice(items: Sequence[T], share: Share) -> list[T]:
    """Return this data-parallel rank's contiguous part: samples of one prompt mostly stay together."""
    return list(items[len(items) * share.rank // share.ranks : len(items) * (share.rank + 1) // share.ranks])


def all_gather_responses(
    cluster: Cluster,
    responses: Sequence[Response],
    prompts: Sequence[list[int]],
    samples: int,
    first_sequence_id: int,
) -> list[Response]:
    """Return the responses of all data-parallel ranks, ordered by prompt and sample. Collective.

    A rank sends its token ids and log-probs, four bytes each, and a header of 16 bytes per response.

    Args:
        cluster: the process groups.
        responses: this rank's responses.
        prompts: token ids of every prompt.
        samples: number of samples per prompt.
        first_sequence_id: the id of the first sample of the first prompt.
    """
    gathered = list(responses)
    if cluster.share.ranks > 1:
        cluster.barrier()  # the longest response of another rank may take long
        messages = cluster.all_gather(_encode(gathered))
        gathered = [r for message in messages for r in _decode(message, prompts, samples, first_sequence_id)]
    return sorted(gathered, key=lambda r: (r.prompt_index, r.sample))


def _encode(responses: list[Response]) -> Tensor:
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


def _decode(message: Tensor, prompts: Sequence[list[int]], samples: int, first_sequence_id: int) -> Iterator[Response]:
    count = int(message[0])
    headers = message[1 : 1 + _HEADER * count].view(count, _HEADER).tolist()
    body = message[1 + _HEADER * count :]
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
