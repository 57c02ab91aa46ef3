"""The few statistics that a report states: paired intervals, pair accuracies, diversity. NumPy only, deterministic."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "accuracy_by_margin",
    "best_one_feature_baseline",
    "distinct_fraction",
    "explained_variance",
    "pair_accuracy",
    "paired_bootstrap_ci95",
]

FeaturePairs = Mapping[str, tuple[Any, Any]]


def paired_bootstrap_ci95(before: Any, after: Any, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile-bootstrap interval of mean(after - before) over prompts.

    before, after: one number per prompt, the same prompts in the same order (average the samples of a prompt first:
    they are not independent). Raises ValueError for unequal lengths, fewer than two prompts or a number not finite.
    """
    before_N, after_N = _vector("before", before), _vector("after", after)
    if before_N.shape != after_N.shape:
        raise ValueError(f"before has {before_N.size} prompts and after {after_N.size}: a paired interval needs both")
    gain_N = after_N - before_N
    if gain_N.size < 2:
        raise ValueError(f"{gain_N.size} prompts give no interval: at least two are needed")
    if not np.isfinite(gain_N).all():
        raise ValueError("before and after must be finite: leave out the prompts that could not be scored")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, 2_000_000 // gain_N.size)  # bounds the memory of one draw
    for start in range(0, resamples, rows):
        drawn = generator.integers(gain_N.size, size=(min(rows, resamples - start), gain_N.size))
        means[start : start + rows] = gain_N[drawn].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pair_accuracy(scores_winner: Any, scores_loser: Any) -> float:
    """Share of pairs whose winner scores higher; equal scores count half. NaN without a pair."""
    winner, loser = _vector("scores_winner", scores_winner), _vector("scores_loser", scores_loser)
    if winner.shape != loser.shape:
        raise ValueError(f"{winner.size} winners and {loser.size} losers: give one of each per pair")
    if winner.size == 0:
        return float("nan")
    return float(((winner > loser) + 0.5 * (winner == loser)).mean())


def accuracy_by_margin(margins: Any, correct: Any, edges: Sequence[float]) -> list[dict[str, float | int | None]]:
    """Accuracy of pairs grouped by how far apart the truth puts them.

    margins: true score of the winner minus the loser's. correct: 1, 0, or 0.5 for equal scores. edges: increasing
    ends of the bins, [low, high), the last one closed. No pair is lost: margins outside the edges get a bin whose
    outer end is None. An empty bin's accuracy is None.
    """
    margin, right, ends = _vector("margins", margins), _vector("correct", correct), _vector("edges", edges)
    if margin.shape != right.shape:
        raise ValueError(f"{margin.size} margins and {right.size} outcomes: give one of each per pair")
    if ends.size < 2 or not (np.diff(ends) > 0).all():
        raise ValueError(f"edges must be at least two increasing numbers, not {list(edges)}")
    bins = [(low, high, (margin >= low) & (margin < high)) for low, high in itertools.pairwise(ends)]
    low, high, inside = bins[-1]
    bins[-1] = (low, high, inside | (margin == high))
    outer = [(None, ends[0], margin < ends[0]), (ends[-1], None, margin > ends[-1])]
    bins = [b for b in outer[:1] if b[2].any()] + bins + [b for b in outer[1:] if b[2].any()]
    return [
        {
            "margin_low": _finite_or_none(low),
            "margin_high": _finite_or_none(high),
            "pairs": int(inside.sum()),
            "accuracy": float(right[inside].mean()) if inside.any() else None,
        }
        for low, high, inside in bins
    ]


def best_one_feature_baseline(train: FeaturePairs, heldout: FeaturePairs) -> tuple[str, float]:
    """The best that a single feature (length, say) does at telling winners from losers: (name, held-out accuracy).

    train, heldout: name -> (values of the winners, values of the losers). Whether more is better is read off the
    training pairs, never off the held-out ones; the feature is the one that does best on the held-out pairs, so that
    a reward model has to beat the luckiest. The name says the direction, as in "length (higher)" where longer wins.
    """
    if not train or set(train) != set(heldout):
        raise ValueError(f"train has the features {sorted(train)} and heldout {sorted(heldout)}: they must be the same")
    results = []
    for name in sorted(train):
        higher = pair_accuracy(*train[name]) >= 0.5
        accuracy = pair_accuracy(*heldout[name])
        direction = "higher" if higher else "lower"
        results.append((accuracy if higher else 1.0 - accuracy, f"{name} ({direction})"))
    accuracy, name = max(results, key=lambda result: result[0])
    return name, accuracy


def distinct_fraction(texts: Sequence[str]) -> float:
    """Distinct texts over all texts, outer white space aside: 1 when no two are the same."""
    if len(texts) == 0:
        raise ValueError("distinct_fraction needs at least one text")
    return len({text.strip() for text in texts}) / len(texts)


def explained_variance(values: Any, returns: Any) -> float:
    """1 - var(returns - values) / var(returns): 1 is perfect, 0 no better than the mean, negative worse.

    Returns that are all the same have no variance to explain: 0.
    """
    value_A, return_A = _vector("values", values), _vector("returns", returns)
    if value_A.shape != return_A.shape:
        raise ValueError(f"{value_A.size} values and {return_A.size} returns: give one of each per action")
    variance = return_A.var() if return_A.size else 0.0
    return float(1.0 - (return_A - value_A).var() / variance) if variance > 0 else 0.0


def _vector(name: str, values: Any) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {vector.shape}")
    return vector


def _finite_or_none(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
