"""Gather responses over data-parallel ranks: each rank samples a part, and every rank receives all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icegrt.distributed.cluster import Cluster
from icegrt.rollout.types import FinishReason, Response

_REASONS: tuple[FinishReason, ...] = ("stop", "length")
_HEADER = 4  # prompt, sample, tokens, reason


def all_gather_responses(
    cluster: Cluster,
    responses: Sequence[Response],
    prompts: Sequence[list[int]],
    samples: int,
    first_sequence_id: int,
    policy_version: int,
) -> list[Response]:
    """Return the responses of all data-parallel ranks, ordered by prompt and sample. Collective.

    A rank sends its token ids and log-probs, four bytes each, and a header of 16 bytes per response.

    Args:
        cluster: the process groups.
        responses: this rank's responses.
        prompts: token ids of every prompt.
        samples: number of samples per prompt.
        first_sequence_id: the id of the first sample of the first prompt.
        policy_version: of the weights that sampled all of them.
    """
    gathered = list(responses)
    if cluster.share.ranks > 1:
        cluster.barrier()  # the longest response of another rank may take long
        messages = cluster.all_gather(_encode(gathered))
        gathered = [
            r for message in messages for r in _decode(message, prompts, samples, first_sequence_id, policy_version)
        ]
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


def _decode(
    message: Tensor, prompts: Sequence[list[int]], samples: int, first_sequence_id: int, policy_version: int
) -> Iterator[Response]:
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
            [policy_version] * len(token_n),
        )
