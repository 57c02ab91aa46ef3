"""Log-probs, values and scores of packed batches, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icegrt.kernels import linear_logprobs
from icegrt.packing import PackedBatch
from icegrt.roles.role import Role


def score_logprobs(
    role: Role, batches: Sequence[PackedBatch], temperature: float, chunk_rows: int | None, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropies) of every action under a role, [A] float32 on the CPU."""

    def read(hidden_TH: Tensor, index: int):
        batch = batches[index].to(hidden_TH.device)
        out = linear_logprobs(
            hidden_TH[batch.action_rows_A],
            role.model.lm_weight_VH,
            batch.action_tokens_A,
            mask_A=batch.action_mask_A,
            temperature=temperature,
            entropy=entropy,
            shard=role.model.vocab_shard,
            chunk_rows=chunk_rows,
        )
        return (out.logprob_A, out.entropy_A) if entropy else (out.logprob_A,)

    columns = _joined(role.score(batches, read))
    return columns[0], columns[1] if entropy else None


def score_values(role: Role, batches: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
    """The critic's values before every action ([A]) and after every sequence's last token ([N])."""

    def read(hidden_TH: Tensor, index: int):
        batch = batches[index].to(hidden_TH.device)
        return role.model.head(hidden_TH[batch.action_rows_A]), role.model.head(hidden_TH[batch.last_rows_N])

    value_A, last_value_N = _joined(role.score(batches, read))
    return value_A, last_value_N


def score_sequences(role: Role, batches: Sequence[PackedBatch]) -> Tensor:
    """The reward model's score of every sequence, read at its last token, [N]."""

    def read(hidden_TH: Tensor, index: int):
        return (role.model.head(hidden_TH[batches[index].last_rows_N.to(hidden_TH.device)]),)

    return _joined(role.score(batches, read))[0]


def _joined(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*rows, strict=True)]
