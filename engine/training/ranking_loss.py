"""The pairwise loss of a reward model over the ranking of all responses to a prompt.

    L = -1/P * sum over untied pairs of log sigmoid(score_winner - score_loser)

P is the number of untied pairs of the prompt. The batch's loss is the mean over prompts that have a pair
(Ouyang et al., 2022, equation 1, without ties).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from icegrt.data import Ranking, untied_pairs
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.packing import PackedBatch, Share, pack
from icegrt.roles.micro_batch import LossOutput
from icegrt.roles.role import Role

# Micro-batches per scoring pass: held-out data may be packed on access, and must not be in memory as a whole.
_EVALUATION_BATCHES = 256


@dataclass(frozen=True, eq=False)
class RankedBatch(PackedBatch):
    """A micro-batch of complete rankings: all responses to a prompt are in it.

    Attributes:
        winners_P, losers_P: int64, indices into the batch's sequences, one pair per entry.
        weight_P: 1 / untied pairs of the prompt.
        margin_P: true score of the winner - true score of the loser.
        prompts: number of prompts that have a pair.
        all_pairs: number of pairs, ties included.
    """

    winners_P: Tensor
    losers_P: Tensor
    weight_P: Tensor
    margin_P: Tensor
    prompts: int
    all_pairs: int

    @property
    def untied_pairs(self) -> int:
        """Number of untied pairs."""
        return self.winners_P.numel()


@dataclass(frozen=True)
class RankingStats:
    """loss_sum: over prompts, 0-dim fp64; difference_P: score of the winner - score of the loser."""

    loss_sum: Tensor
    difference_P: Tensor

    def merge(self, other: RankingStats) -> RankingStats:
        """Return the sum of the losses, and the pairs of both."""
        return RankingStats(self.loss_sum + other.loss_sum, torch.cat([self.difference_P, other.difference_P]))


@dataclass(frozen=True)
class RewardModelLoss:
    """The pairwise loss of a role with a scalar head, which is read at every response's last token."""

    role: Role

    def __call__(self, hidden_TH: Tensor, batch: RankedBatch) -> LossOutput:
        return ranking_loss(self.role.model.head(hidden_TH[batch.last_rows_N]), batch)


def pack_rankings(
    rankings: Sequence[Ranking], token_budget: int, tie_margin: float, share: Share | None = None
) -> list[RankedBatch]:
    """Pack this rank's share of the rankings (None: all) into micro-batches under a token budget."""
    share = share or Share()
    micro_batches = share.assign([len(r) for r in rankings], token_budget)[share.rank]
    return [pack_group([rankings[i] for i in members], tie_margin, share.tail_multiple) for members in micro_batches]


def pack_group(rankings: list[Ranking], tie_margin: float, tail_multiple: int = 1) -> RankedBatch:
    """Pack rankings into one micro-batch."""
    prompts, responses, pairs, weights, margins = [], [], [], [], []
    prompts_with_pairs = all_pairs = 0
    for ranking in rankings:
        first = len(responses)
        prompts += [ranking.prompt] * len(ranking.responses)
        responses += ranking.responses
        ranking_pairs = untied_pairs(ranking.scores, tie_margin, ranking.responses)
        all_pairs += len(ranking.scores) * (len(ranking.scores) - 1) // 2
        prompts_with_pairs += bool(ranking_pairs)
        for winner, loser in ranking_pairs:
            pairs.append((first + winner, first + loser))
            weights.append(1.0 / len(ranking_pairs))
            margins.append(ranking.scores[winner] - ranking.scores[loser])
    index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return pack(prompts, responses, tail_multiple=tail_multiple).extended(
        RankedBatch,
        winners_P=index[:, 0],
        losers_P=index[:, 1],
        weight_P=torch.tensor(weights),
        margin_P=torch.tensor(margins),
        prompts=prompts_with_pairs,
        all_pairs=all_pairs,
    )


def ranking_loss(score_N: Tensor, batch: RankedBatch) -> LossOutput:
    """Return the sum over prompts of their mean pair loss, counted per prompt with a pair.

    Args:
        score_N: [N] scores of the batch's sequences, on the batch's device.
        batch: the pairs.
    """
    difference_P = score_N[batch.winners_P] - score_N[batch.losers_P]
    # 0 * score keeps a micro-batch without pairs attached to the scores, so that it has a backward pass.
    loss = -(logsigmoid(difference_P) * batch.weight_P).sum() + 0.0 * score_N.sum()
    return LossOutput(loss, batch.prompts, RankingStats(loss.detach().double(), difference_P.detach()))


@dataclass(frozen=True)
class RankingQuality:
    """How a reward model ranks held-out answers.

    Attributes:
        loss: per prompt with a pair.
        accuracy: fraction of untied pairs in the right order; equal scores count as half.
        difference_P, margin_P: differences of scores and of true scores, over untied pairs.
        score_N: raw scores of all responses.
    """

    loss: float
    accuracy: float
    difference_P: Tensor
    margin_P: Tensor
    score_N: Tensor


def evaluate_ranking(role: Role, batches: Sequence[RankedBatch], cluster: Cluster) -> RankingQuality:
    """Return loss, pair accuracy and scores over the rankings of all data-parallel ranks. Collective."""

    def read(hidden_TH: Tensor, batch: RankedBatch) -> tuple[Tensor]:
        return (role.model.head(hidden_TH[batch.last_rows_N]),)

    scores: list[Tensor] = []
    losses: list[LossOutput] = []
    margins: list[Tensor] = []
    for start in range(0, len(batches), _EVALUATION_BATCHES):
        part = batches[start : start + _EVALUATION_BATCHES]
        part_scores = fetch([score_N for (score_N,) in role.score(part, read, lambda batch: (batch.n_sequences,))])
        losses += [ranking_loss(score_N, batch) for score_N, batch in zip(part_scores, part, strict=True)]
        scores += part_scores
        margins += [batch.margin_P for batch in part]
    loss_sum, prompts = cluster.all_reduce_sum([sum(x.stats.loss_sum for x in losses), sum(x.count for x in losses)])
    difference_P, margin_P, score_N = (
        torch.cat(cluster.all_gather(torch.cat(parts)))
        for parts in ([x.stats.difference_P for x in losses], margins, scores)
    )
    right_P = (difference_P > 0).double() + 0.5 * (difference_P == 0).double()
    return RankingQuality(
        loss=loss_sum / max(prompts, 1),
        accuracy=float(right_P.mean()) if right_P.numel() else 0.5,
        difference_P=difference_P,
        margin_P=margin_P,
        score_N=score_N,
    )
