"""Likelihood of given answers: the loss of supervised fine-tuning, of held-out evaluation and of ptx mixing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from icegrt.data import Example
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.kernels import linear_logprobs
from icegrt.packing import PackedBatch, Share, pack
from icegrt.roles.micro_batch import LossOutput
from icegrt.roles.role import Role


@dataclass(frozen=True)
class NLLStats:
    """loss_sum: -log p summed over response tokens, nats, 0-dim fp64 on the device; tokens: how many count."""

    loss_sum: Tensor | float = 0.0
    tokens: int = 0

    def merge(self, other: NLLStats) -> NLLStats:
        """Return the sums of both."""
        return NLLStats(self.loss_sum + other.loss_sum, self.tokens + other.tokens)


@dataclass(frozen=True)
class SFTLoss:
    """-log p of the response tokens, summed; counted per response token."""

    role: Role
    chunk_rows: int | None

    def __call__(self, hidden_TH: Tensor, batch: PackedBatch) -> LossOutput:
        loss, tokens = response_nll(self.role, hidden_TH, batch, self.chunk_rows), batch.n_counted_actions
        return LossOutput(loss, tokens, NLLStats(loss.detach().double(), tokens))


def response_nll(role: Role, hidden_TH: Tensor, batch: PackedBatch, chunk_rows: int | None) -> Tensor:
    """Return -log p of the response tokens, summed, at temperature 1: the loss of SFT and of ptx mixing."""
    weight_VH, weight_grad_VH = role.model.lm_weight_and_grad()
    out = linear_logprobs(
        hidden_TH[batch.action_rows_A],
        weight_VH,
        batch.action_tokens_A,
        mask_A=batch.action_mask_A,
        shard=role.model.vocab_shard,
        chunk_rows=chunk_rows,
        weight_grad_out=weight_grad_VH,
        rows_R=batch.counted_index,
    )
    return -out.logprob_A.sum()


def pack_examples(examples: Sequence[Example], token_budget: int, share: Share | None = None) -> list[PackedBatch]:
    """Pack this rank's share of the examples (None: all) into micro-batches of at most `token_budget` tokens."""
    share = share or Share()
    micro_batches = share.assign([len(e) for e in examples], token_budget)[share.rank]
    return [pack_group([examples[i] for i in members], share.tail_multiple) for members in micro_batches]


def pack_group(group: list[Example], tail_multiple: int = 1) -> PackedBatch:
    """Pack examples into one micro-batch."""
    masks = None
    if any(e.action_mask is not None for e in group):
        masks = [e.action_mask if e.action_mask is not None else [True] * len(e.response) for e in group]
    prompts, responses = [e.prompt for e in group], [e.response for e in group]
    return pack(prompts, responses, action_masks=masks, tail_multiple=tail_multiple)


def heldout_loss(role: Role, batches: Sequence[PackedBatch], chunk_rows: int | None, cluster: Cluster) -> float:
    """Return the mean -log p per response token over the `batches` of all data-parallel ranks, nats. Collective."""

    def read(hidden_TH: Tensor, batch: PackedBatch) -> tuple[Tensor]:
        return (response_nll(role, hidden_TH, batch, chunk_rows).reshape(1),)

    totals = fetch([total for (total,) in role.score(batches, read, lambda batch: (1,))])
    local_sum = sum(map(float, totals))
    total, count = cluster.all_reduce_sum([local_sum, sum(batch.n_counted_actions for batch in batches)])
    return total / max(count, 1)
