"""Padded batches of prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episode:
    """A prompt and its sampled answer, as token ids. An answer that ended has its EOS."""

    prompt: list[int]
    answer: list[int]
    truncated: bool = False


@dataclass(frozen=True)
class PaddedBatch:
    """N episodes, padded on the right to the longest of them, L tokens.

    Attributes:
        members: number of each row among all episodes.
        tokens_NL: [N, L] int64.
        attention_NL: [N, L] int64, 1 at prompt and answer.
        answer_NL: [N, L - 1] bool, whether the token after this position belongs to the answer.
        last_N: [N] int64, position of the last token.
    """

    members: list[int]
    tokens_NL: Tensor
    attention_NL: Tensor
    answer_NL: Tensor
    last_N: Tensor


def padded_batches(
    episodes: Sequence[Episode], members: Sequence[int], rows: int, pad_id: int, *, by_length: bool = False
) -> list[PaddedBatch]:
    """Return the episodes `members` in batches of `rows`; `by_length`: of similar length."""
    members = list(members)
    if by_length:
        members.sort(key=lambda n: len(episodes[n].prompt) + len(episodes[n].answer))
    return [_pad(episodes, members[i : i + rows], pad_id) for i in range(0, len(members), rows)]


def padding_fraction(batches: Sequence[PaddedBatch]) -> float:
    """Return the share of padding among all positions of the batches."""
    positions = sum(batch.attention_NL.numel() for batch in batches)
    return 1 - sum(int(batch.attention_NL.sum()) for batch in batches) / positions


def _pad(episodes: Sequence[Episode], members: list[int], pad_id: int) -> PaddedBatch:
    lengths = [len(episodes[n].prompt) + len(episodes[n].answer) for n in members]
    tokens_NL = torch.full((len(members), max(lengths)), pad_id)
    attention_NL = torch.zeros_like(tokens_NL)
    answer_NL = torch.zeros(len(members), max(lengths) - 1, dtype=torch.bool)
    for row, (n, length) in enumerate(zip(members, lengths, strict=True)):
        episode = episodes[n]
        tokens_NL[row, :length] = torch.tensor(episode.prompt + episode.answer)
        attention_NL[row, :length] = 1
        answer_NL[row, len(episode.prompt) - 1 : length - 1] = True
    return PaddedBatch(members, tokens_NL, attention_NL, answer_NL, torch.tensor(lengths) - 1)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, as `generate` takes them, and their attention mask: [N, L] int64 each."""
    longest = max(map(len, prompts))
    tokens_NL = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_NL = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens_NL, mask_NL
