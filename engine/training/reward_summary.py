"""The held-out figures of a reward model: accuracy, in all and by margin, and the best single-feature baseline."""

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

_BASELINE_PROMPTS = 4096  # most training prompts that the baseline is fitted on
_FEW_PAIRS = 50  # below it the 95% interval of an accuracy, at most 0.98 / sqrt(pairs), is wider than 0.14


def heldout_figures(
    config: RewardConfig, before: dict[str, Any], after: RankingQuality, heldout: ConcatDataset, training: ConcatDataset
) -> dict[str, Any]:
    """Return the figures of `summary.json`.

    Accuracies are None if there is no untied pair.

    Args:
        config: token budget and tie margin are read.
        before: loss and accuracy before training.
        after: over the rankings of all ranks.
        heldout: held-out rankings of all ranks.
        training: training rankings of all ranks.
    """
    heldout_batches = packed(heldout, config.token_budget, partial(pack_group, tie_margin=config.tie_margin))
    pairs, all_pairs = after.margin_P.numel(), sum(batch.all_pairs for batch in heldout_batches)
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
        training_batches = pack_rankings(training[:_BASELINE_PROMPTS], config.token_budget, config.tie_margin)
        name, accuracy = best_one_feature_baseline(_feature_pairs(training_batches), _feature_pairs(heldout_batches))
        figures |= {"baseline_feature": name, "baseline_accuracy": accuracy}
    return figures


def surprises(figures: dict[str, Any]) -> list[str]:
    """Return in words why the held-out accuracy should not be trusted, each with a remedy; usually nothing.

    Args:
        figures: of `heldout_figures`.
    """
    messages = []
    pairs, accuracy = figures["heldout_pairs"], figures["heldout_accuracy"]
    if 0 < pairs < _FEW_PAIRS:
        messages.append(
            f"the reward model is judged on {pairs} held-out pairs only, so its accuracy of {accuracy:.3f} may be off "
            f"by {0.98 / pairs**0.5:.2f}; hold out more prompts (reward.heldout or reward.heldout_fraction)"
        )
    if pairs and accuracy < figures["baseline_accuracy"]:
        messages.append(
            f"the reward model is right on {accuracy:.3f} of the held-out pairs, its best single feature "
            f"({figures['baseline_feature']}) on {figures['baseline_accuracy']:.3f}: PPO would learn that feature. Add "
            "rankings in which it does not decide, or train longer"
        )
    return messages


def _feature_pairs(batches: Sequence[RankedBatch]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return by feature its values for winners and for losers: length, and overlap with the prompt."""
    features: dict[str, tuple[list, list]] = {"length": ([], []), "overlap with the prompt": ([], [])}
    for batch in batches:
        rows = [_features(batch, n) for n in range(batch.n_sequences)]
        for side, index in enumerate((batch.winners_P, batch.losers_P)):
            for n in index.tolist():
                for name in features:
                    features[name][side].append(rows[n][name])
    return {name: (np.array(winners, float), np.array(losers, float)) for name, (winners, losers) in features.items()}


def _features(batch: RankedBatch, n: int) -> dict[str, float]:
    response = batch.action_tokens_A[batch.cu_actions[n] : batch.cu_actions[n + 1]].tolist()
    start, end = batch.cu_seqlens[n].item(), batch.cu_seqlens[n + 1].item()
    prompt = set(batch.tokens_T[start : end - len(response)].tolist())
    shared = sum(token in prompt for token in response)
    return {"length": len(response), "overlap with the prompt": shared / max(len(response), 1)}
