"""Likelihood of given answers: the loss of supervised fine-tuning, of held-out evaluation and of ptx mixing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icegrt.data import Example
from icegrt.kernels import linear_logprobs
from icegrt.packing import PackedBatch, balance, pack
from icegrt.roles.role import Role


def response_nll(role: Role, hidden_TH: Tensor, batch: PackedBatch, chunk_rows: int | None) -> Tensor:
    """-log p of the response tokens, summed, at temperature 1: the loss of SFT and of ptx mixing."""
    out = linear_logprobs(
        hidden_TH[batch.action_rows_A],
        role.model.lm_weight_VH,
        batch.action_tokens_A,
        mask_A=batch.action_mask_A,
        shard=role.model.vocab_shard,
        chunk_rows=chunk_rows,
    )
    return -out.logprob_A.sum()


def pack_examples(examples: Sequence[Example], token_budget: int) -> list[PackedBatch]:
    """Examples into packed micro-batches of at most `token_budget` tokens."""
    (micro_batches,) = balance([len(e) for e in examples], token_budget=token_budget).assignments
    return [pack_group([examples[i] for i in members]) for members in micro_batches]


def pack_group(group: list[Example]) -> PackedBatch:
    """Examples as one micro-batch."""
    masks = None
    if any(e.action_mask is not None for e in group):
        masks = [e.action_mask if e.action_mask is not None else [True] * len(e.response) for e in group]
    return pack([e.prompt for e in group], [e.response for e in group], action_masks=masks)


def heldout_loss(role: Role, batches: Sequence[PackedBatch], chunk_rows: int | None) -> float:
    """Mean -log p per response token over `batches`, nats."""

    def read(hidden_TH: Tensor, index: int):
        batch = batches[index].to(hidden_TH.device)
        return response_nll(role, hidden_TH, batch, chunk_rows).double(), batch.n_counted_actions

    results = role.score(batches, read)
    return float(sum(total for total, _ in results)) / max(sum(count for _, count in results), 1)
