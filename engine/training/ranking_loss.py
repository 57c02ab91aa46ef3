"""The pairwise loss of a reward model over the ranking of all responses to a prompt.

L = -1/P * sum over untied pairs of log sigmoid(r_winner - r_loser), P the number of untied pairs of the prompt; the
batch's loss is the mean over prompts that have a pair (Ouyang et al., 2022, equation 1, with ties left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from icegrt.data import Ranking, untied_pairs
from icegrt.distributed.cluster import Cluster
from icegrt.packing import PackedBatch, Share, pack
from icegrt.roles.role import Loss, Role

_AT_ONCE = 256


@dataclass(frozen=True)
class RankedBatch:
    """A micro-batch of whole rankings: all responses of a prompt are in it.

    winners_P, losers_P: indices into the batch's sequences; weight_P: 1 / untied pairs of the prompt; margin_P: by how
    much the truth prefers the winner. prompts: how many have a pair.
    """

    batch: PackedBatch
    winners_P: Tensor
    losers_P: Tensor
    weight_P: Tensor
    margin_P: Tensor
    prompts: int
    all_pairs: int

    @property
    def untied_pairs(self) -> int:
        return self.winners_P.numel()


def pack_rankings(
    rankings: Sequence[Ranking], token_budget: int, tie_margin: float, share: Share | None = None
) -> list[RankedBatch]:
    """This rank's share of the rankings (None: all) in micro-batches under a token budget; none is torn apart."""
    share = share or Share()
    micro_batches = share.assign([len(r) for r in rankings], token_budget)[share.rank]
    return [pack_group([rankings[i] for i in members], tie_margin, share.tail_multiple) for members in micro_batches]


def pack_group(rankings: list[Ranking], tie_margin: float, tail_multiple: int = 1) -> RankedBatch:
    """Rankings as one micro-batch."""
    prompts, responses, pairs, weights, margins = [], [], [], [], []
    with_pairs = all_pairs = 0
    for ranking in rankings:
        first = len(responses)
        prompts += [ranking.prompt] * len(ranking.responses)
        responses += ranking.responses
        mine = untied_pairs(ranking.scores, tie_margin)
        all_pairs += len(ranking.scores) * (len(ranking.scores) - 1) // 2
        with_pairs += bool(mine)
        for winner, loser in mine:
            pairs.append((first + winner, first + loser))
            weights.append(1.0 / len(mine))
            margins.append(ranking.scores[winner] - ranking.scores[loser])
    index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return RankedBatch(
        pack(prompts, responses, tail_multiple=tail_multiple),
        index[:, 0],
        index[:, 1],
        torch.tensor(weights),
        torch.tensor(margins),
        with_pairs,
        all_pairs,
    )


def ranking_loss(score_N: Tensor, ranked: RankedBatch) -> Loss:
    """Sum over prompts of their mean pair loss, the number of prompts with a pair, and the margins of the scores."""
    device = score_N.device
    difference_P = score_N[ranked.winners_P.to(device)] - score_N[ranked.losers_P.to(device)]
    # A sum over no pairs is still attached to the scores: a micro-batch of ties has a backward pass like any other.
    total = -(logsigmoid(difference_P) * ranked.weight_P.to(device)).sum() + 0.0 * score_N.sum()
    return total, ranked.prompts, (float(total.detach()), difference_P.detach().cpu())


@dataclass(frozen=True)
class RankingQuality:
    """How a reward model ranks held-out answers. accuracy counts equal scores as half right."""

    loss: float
    accuracy: float
    difference_P: Tensor
    margin_P: Tensor
    score_N: Tensor


def evaluate_ranking(role: Role, ranked: Sequence[RankedBatch]) -> RankingQuality:
    """Loss per prompt, pair accuracy and scores over the rankings of all data-parallel ranks."""

    cluster = Cluster.current()
    scores, losses, margins = [], [], []
    for start in range(0, len(ranked), _AT_ONCE):  # held-out data may be packed when read: never all of it at once
        part = ranked[start : start + _AT_ONCE]

        def read(hidden_TH: Tensor, index: int, part=part) -> tuple[Tensor]:
            return (role.model.head(hidden_TH[part[index].batch.last_rows_N.to(hidden_TH.device)]),)

        some = [score_N for (score_N,) in role.score([r.batch for r in part], read)]
        losses += [ranking_loss(score_N, r) for score_N, r in zip(some, part, strict=True)]
        scores += some
        margins += [r.margin_P for r in part]
    loss, prompts = cluster.all_reduce_sum(
        [sum(stats[0] for _, _, stats in losses), sum(count for _, count, _ in losses)]
    )
    difference_P, margin_P, score_N = (
        torch.cat(cluster.all_gather(torch.cat(parts)))
        for parts in ([stats[1] for _, _, stats in losses], margins, scores)
    )
    right_P = (difference_P > 0).double() + 0.5 * (difference_P == 0).double()
    return RankingQuality(
        loss=loss / max(prompts, 1),
        accuracy=float(right_P.mean()) if right_P.numel() else 0.5,
        difference_P=difference_P,
        margin_P=margin_P,
        score_N=score_N,
    )
