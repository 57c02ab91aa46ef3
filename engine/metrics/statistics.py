"""Statistics of a report: paired intervals, pairwise accuracies, diversity. NumPy only, deterministic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "accuracy_by_margin",
    "best_one_feature_baseline",
    "distinct_fraction",
    "explained_variance",
    "has_spread",
    "pair_accuracy",
    "paired_bootstrap_ci95",
]

# A smaller standard deviation over |mean| is the rounding of fp32 scores, not a spread.
_LEAST_RELATIVE_STD = 1e-6

FeaturePairs = Mapping[str, tuple[Any, Any]]


def paired_bootstrap_ci95(before: Any, after: Any, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95% percentile-bootstrap interval of mean(after - before) over prompts.

    Args:
        before: one number per prompt. Average the samples of a prompt first: they are not independent.
        after: the same prompts, in the same order.
        seed: seed of the resamples.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: unequal lengths, fewer than two prompts, or a number that is not finite.

    Shape:
        before, after: (N,), N prompts.
    """
    before_N, after_N = _vector("before", before), _vector("after", after)
    if before_N.shape != after_N.shape:
        raise ValueError(f"before has {before_N.size} prompts and after {after_N.size}: a paired interval needs both")
    gain_N = after_N - before_N
    if gain_N.size < 2:
        raise ValueError(f"{gain_N.size} prompts give no interval: at least two are needed")
    if not np.isfinite(gain_N).all():
        raise ValueError("before and after must be finite: drop the prompts that could not be scored")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, 2_000_000 // gain_N.size)  # bounds the memory of one block of resamples
    for start in range(0, resamples, rows):
        prompts = generator.integers(gain_N.size, size=(min(rows, resamples - start), gain_N.size))
        means[start : start + rows] = gain_N[prompts].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def pair_accuracy(scores_winner: Any, scores_loser: Any) -> float:
    """Return the fraction of pairs whose winner has the higher score; equal scores count half. NaN without a pair."""
    winner, loser = _vector("scores_winner", scores_winner), _vector("scores_loser", scores_loser)
    if winner.shape != loser.shape:
        raise ValueError(f"{winner.size} winners and {loser.size} losers: give one of each per pair")
    if winner.size == 0:
        return float("nan")
    return float(((winner > loser) + 0.5 * (winner == loser)).mean())


def accuracy_by_margin(margins: Any, correct: Any, edges: Sequence[float]) -> list[dict[str, float | int | None]]:
    """Return the accuracy of pairs in bins of their true margin.

    Args:
        margins: true score of the winner minus that of the loser.
        correct: 1, 0, or 0.5 for equal scores.
        edges: increasing ends of the bins, [low, high), the last one closed.

    Returns:
        A dict per bin. Margins outside the edges get a bin whose outer end is None. An empty bin's accuracy is None.

    Raises:
        ValueError: unequal lengths, or edges that do not increase.
    """
    margin, is_correct, ends = _vector("margins", margins), _vector("correct", correct), _vector("edges", edges)
    if margin.shape != is_correct.shape:
        raise ValueError(f"{margin.size} margins and {is_correct.size} outcomes: give one of each per pair")
    if ends.size < 2 or not (np.diff(ends) > 0).all():
        raise ValueError(f"edges must be at least two increasing numbers, not {list(edges)}")
    bins = [(low, high, (margin >= low) & (margin < high)) for low, high in itertools.pairwise(ends)]
    low, high, in_last = bins[-1]
    bins[-1] = (low, high, in_last | (margin == high))
    outer = [(None, ends[0], margin < ends[0]), (ends[-1], None, margin > ends[-1])]
    bins = [b for b in outer[:1] if b[2].any()] + bins + [b for b in outer[1:] if b[2].any()]
    return [
        {
            "margin_low": _finite_or_none(low),
            "margin_high": _finite_or_none(high),
            "pairs": int(in_bin.sum()),
            "accuracy": float(is_correct[in_bin].mean()) if in_bin.any() else None,
        }
        for low, high, in_bin in bins
    ]


def best_one_feature_baseline(train: FeaturePairs, heldout: FeaturePairs) -> tuple[str, float]:
    """Return the single feature that best predicts the winners, and its held-out accuracy.

    The training pairs decide if a higher or a lower value wins. The held-out pairs choose the feature, so that a reward
    model must beat the best of all features.

    Args:
        train: feature name -> (values of the winners, values of the losers) of the training pairs.
        heldout: the same of the held-out pairs.

    Returns:
        The name with its direction, such as "length (higher)", and the accuracy.

    Raises:
        ValueError: no feature, or different features.
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
    """Return the number of distinct texts over the number of texts; surrounding white space is ignored."""
    if len(texts) == 0:
        raise ValueError("distinct_fraction needs at least one text")
    return len({text.strip() for text in texts}) / len(texts)


def explained_variance(values: Any, returns: Any) -> float:
    """Return the fraction of the returns' variance that the values explain; 0 if the returns have no spread.

        1 - var(returns - values) / var(returns)

    1 is perfect, 0 is as good as the mean of the returns, negative is worse.
    """
    value_A, return_A = _vector("values", values), _vector("returns", returns)
    if value_A.shape != return_A.shape:
        raise ValueError(f"{value_A.size} values and {return_A.size} returns: give one of each per action")
    if not return_A.size or not has_spread(float(return_A.mean()), float(return_A.std())):
        return 0.0
    return float(1.0 - (return_A - value_A).var() / return_A.var())


def has_spread(mean: float, std: float) -> bool:
    """Return whether a standard deviation is large enough to divide by.

        std > 1e-6 * |mean|

    One number, equal numbers, and numbers that differ by fp32 rounding alone have no spread. The floor is that of
    scores, values and returns, which models compute in fp32, where equal numbers differ by 1e-7 of the mean. Kernels
    have their own, `Moments.varies`, for numbers that may be fp64.

    Args:
        mean: of the numbers.
        std: of the numbers; NaN and infinities are no spread.
    """
    return math.isfinite(std) and std > _LEAST_RELATIVE_STD * abs(mean)


def _vector(name: str, values: Any) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not shape {vector.shape}")
    return vector


def _finite_or_none(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
