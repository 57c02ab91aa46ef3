"""Log-probs, values and scores of packed batches, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.kernels import TokenLogprobs, linear_logprobs
from icegrt.packing import PackedBatch
from icegrt.roles.role import Role


@dataclass(frozen=True)
class LogprobScorer:
    """Read log-probs of actions under a policy. Scoring, evaluation and update share its temperature and chunk size.

    chunk_rows: rows of logits formed at once, the same in a whole run: other chunks round differently.
    """

    temperature: float
    chunk_rows: int | None

    def __call__(
        self, role: Role, batches: Sequence[PackedBatch], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-probs (and entropies) of all actions under `role`, [A] float32 on the role's device."""

        def read(hidden_TH: Tensor, batch: PackedBatch) -> tuple[Tensor, ...]:
            out = self.read(role, hidden_TH, batch, entropy=entropy)
            return (out.logprob_A, out.entropy_A) if entropy else (out.logprob_A,)

        columns = _concatenate(role.score(batches, read, lambda batch: (batch.n_actions,) * (1 + entropy)))
        return columns[0], columns[1] if entropy else None

    def read(self, role: Role, hidden_TH: Tensor, batch: PackedBatch, *, entropy: bool = False) -> TokenLogprobs:
        """Return the log-probs (and entropies) of a micro-batch from its hidden states; masked actions have 0."""
        return linear_logprobs(
            hidden_TH[batch.action_rows_A],
            role.model.lm_weight_VH,
            batch.action_tokens_A,
            mask_A=batch.action_mask_A,
            temperature=self.temperature,
            entropy=entropy,
            shard=role.model.vocab_shard,
            chunk_rows=self.chunk_rows,
            rows_R=batch.counted_index,
        )


def score_values(role: Role, batches: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
    """Return values before every action, [A], and after every sequence's last token, [N]; on the device."""

    def read(hidden_TH: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return role.model.head(hidden_TH[batch.action_rows_A]), role.model.head(hidden_TH[batch.last_rows_N])

    rows = role.score(batches, read, lambda batch: (batch.n_actions, batch.n_sequences))
    value_A, last_value_N = _concatenate(rows)
    return value_A, last_value_N


def score_sequences(role: Role, batches: Sequence[PackedBatch]) -> Tensor:
    """Return the reward model's score of every sequence, read at its last token, [N] on the device."""

    def read(hidden_TH: Tensor, batch: PackedBatch) -> tuple[Tensor]:
        return (role.model.head(hidden_TH[batch.last_rows_N]),)

    return _concatenate(role.score(batches, read, lambda batch: (batch.n_sequences,)))[0]


def _concatenate(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*rows, strict=True)]
