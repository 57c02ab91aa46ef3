"""What a reward model is worth on held-out rankings: accuracy, over all and by margin, and the best trivial judge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from icegrt.config import RewardConfig
from icegrt.data import ConcatDataset
from icegrt.data.training_data import packed
from icegrt.metrics.statistics import accuracy_by_margin, best_one_feature_baseline
from icegrt.training.ranking_loss import RankedBatch, RankingQuality, pack_group, pack_rankings

_BASELINE_PROMPTS = 4096  # the trivial judge is fitted on so many training prompts at most


def heldout_figures(
    config: RewardConfig, before: dict[str, Any], after: RankingQuality, heldout: ConcatDataset, training: ConcatDataset
) -> dict[str, Any]:
    """The figures of `summary.json`; accuracies are null where held-out answers to one prompt all tie."""
    everyone = packed(heldout, config.token_budget, partial(pack_group, tie_margin=config.tie_margin))
    pairs, all_pairs = after.margin_P.numel(), sum(r.all_pairs for r in everyone)
    figures: dict[str, Any] = {
        "heldout_loss_before": before["loss"],
        "heldout_loss_after": after.loss,
        "heldout_accuracy_before": before["accuracy"] if pairs else None,
        "heldout_accuracy": after.accuracy if pairs else None,
        "heldout_pairs": pairs,
        "heldout_tie_fraction": 1.0 - pairs / max(all_pairs, 1),
    }
    if pairs:
        right_P = (after.difference_P > 0).double() + 0.5 * (after.difference_P == 0).double()
        edges = np.unique(np.quantile(after.margin_P.numpy(), [0.0, 0.25, 0.5, 0.75, 1.0]))
        edges = edges if edges.size > 1 else np.array([edges[0], edges[0] + 1.0])
        figures["heldout_accuracy_by_margin"] = accuracy_by_margin(after.margin_P.numpy(), right_P.numpy(), edges)
        some = pack_rankings(training[:_BASELINE_PROMPTS], config.token_budget, config.tie_margin)
        name, accuracy = best_one_feature_baseline(_feature_pairs(some), _feature_pairs(everyone))
        figures |= {"baseline_feature": name, "baseline_accuracy": accuracy}
    return figures


def _feature_pairs(ranked: Sequence[RankedBatch]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a trivial judge could look at, for winners and losers: length, and overlap with the prompt."""
    features: dict[str, tuple[list, list]] = {"length": ([], []), "overlap with the prompt": ([], [])}
    for r in ranked:
        rows = [_features(r.batch, n) for n in range(r.batch.n_sequences)]
        for side, index in enumerate((r.winners_P, r.losers_P)):
            for n in index.tolist():
                for name in features:
                    features[name][side].append(rows[n][name])
    return {name: (np.array(winners, float), np.array(losers, float)) for name, (winners, losers) in features.items()}


def _features(batch, n: int) -> dict[str, float]:
    response = batch.action_tokens_A[batch.cu_actions[n] : batch.cu_actions[n + 1]].tolist()
    start, end = batch.cu_seqlens[n].item(), batch.cu_seqlens[n + 1].item()
    prompt = set(batch.tokens_T[start : end - len(response)].tolist())
    shared = sum(token in prompt for token in response)
    return {"length": len(response), "overlap with the prompt": shared / max(len(response), 1)}
