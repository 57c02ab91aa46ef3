"""The statistics of the report against closed forms and hand counts."""

import math

import numpy as np
import pytest
import torch

from icegrt.kernels import masked_moments
from icegrt.metrics.statistics import (
    accuracy_by_margin,
    best_one_feature_baseline,
    distinct_fraction,
    explained_variance,
    has_spread,
    pair_accuracy,
    paired_bootstrap_ci95,
)


def test_bootstrap_agrees_with_the_normal_interval():
    noise = np.random.default_rng(0)
    before = noise.normal(size=400)
    after = before + 0.3 + 0.5 * noise.normal(size=400)
    low, high = paired_bootstrap_ci95(before, after)
    gain = after - before
    half = 1.96 * gain.std(ddof=1) / math.sqrt(400)
    assert low == pytest.approx(gain.mean() - half, abs=0.004)
    assert high == pytest.approx(gain.mean() + half, abs=0.004)


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    noise = np.random.default_rng(3)
    inside = 0
    for i in range(300):
        gain = noise.normal(size=60)
        low, high = paired_bootstrap_ci95(np.zeros(60), gain, seed=i, resamples=400)
        inside += low <= 0.0 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_bootstrap_is_paired_and_deterministic():
    before = np.linspace(-100, 100, 50)
    assert paired_bootstrap_ci95(before, before + 1) == pytest.approx((1.0, 1.0))
    noise = np.random.default_rng(0).normal(size=50)
    intervals = [paired_bootstrap_ci95(before, before + noise, seed=5) for _ in range(2)]
    assert intervals[0] == intervals[1] != paired_bootstrap_ci95(before, before + noise, seed=6)
    low, high = paired_bootstrap_ci95(before, before + noise)
    reversed_interval = paired_bootstrap_ci95(before + noise, before)
    assert reversed_interval == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [([1.0], [2.0], "at least two"), ([1.0, 2.0], [1.0], "2 prompts"), ([1.0, math.nan], [1.0, 1.0], "finite")],
)
def test_bootstrap_refuses(before, after, words):
    with pytest.raises(ValueError, match=words):
        paired_bootstrap_ci95(before, after)


def test_pair_accuracy_counts_ties_half():
    assert pair_accuracy([2, 1, 1, 0], [1, 2, 1, -1]) == 0.625
    assert pair_accuracy(torch.zeros(10), torch.zeros(10)) == 0.5
    assert math.isnan(pair_accuracy([], []))
    with pytest.raises(ValueError, match="1 winners and 2 losers"):
        pair_accuracy([1], [1, 2])


def test_accuracy_by_margin_loses_no_pair():
    rows = accuracy_by_margin([0.1, 0.5, 0.9, 1.0, 1.5, -1.0], [1, 0, 1, 1, 0.5, 0], [0.0, 0.5, 0.8, 1.0])
    assert [(r["margin_low"], r["margin_high"], r["pairs"], r["accuracy"]) for r in rows] == [
        (None, 0.0, 1, 0.0),
        (0.0, 0.5, 1, 1.0),
        (0.5, 0.8, 1, 0.0),
        (0.8, 1.0, 2, 1.0),
        (1.0, None, 1, 0.5),
    ]
    empty = accuracy_by_margin([], [], [0.0, math.inf])
    assert empty == [{"margin_low": 0.0, "margin_high": None, "pairs": 0, "accuracy": None}]
    with pytest.raises(ValueError, match="increasing"):
        accuracy_by_margin([], [], [1.0, 0.0])


def test_baseline_takes_its_direction_from_training():
    train = {"length": ([5, 6, 7], [1, 2, 9]), "digits": ([0, 0, 1], [2, 3, 0])}
    heldout = {"length": ([1, 1, 1, 9], [2, 2, 2, 1]), "digits": ([0, 0, 0, 0], [1, 1, 1, 0])}
    assert best_one_feature_baseline(train, heldout) == ("digits (lower)", 0.875)
    only = {"length": train["length"]}, {"length": heldout["length"]}
    assert best_one_feature_baseline(*only) == ("length (higher)", 0.25)
    with pytest.raises(ValueError, match="must be the same"):
        best_one_feature_baseline(train, only[1])


def test_distinct_fraction():
    assert distinct_fraction(["a", "a ", "b", "c"]) == 0.75
    with pytest.raises(ValueError, match="at least one"):
        distinct_fraction([])


def test_explained_variance():
    returns = np.random.default_rng(0).normal(size=1000)
    assert explained_variance(returns + 3, returns) == pytest.approx(1.0)
    assert explained_variance(np.zeros(1000), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, np.ones(1000)) == 0.0 == explained_variance([], [])


def test_a_spread_is_relative_to_the_mean():
    assert explained_variance([0.0, 0.1, 0.2], [-8e8, -8e8, -8e8 + 64.0]) == 0.0  # fp32 rounding of a constant
    assert explained_variance([1e-9, 3e-9], [1e-9, 3e-9]) == 1.0
    assert explained_variance([5.0], [3.0]) == 0.0
    assert has_spread(1e6, 2.0) and not has_spread(1e6, 0.5) and has_spread(0.0, 1e-12)
    # Kernels may see fp64: their floor is lower, for the reason that both docstrings state.
    returns = 1e6 + 1e-3 * np.random.default_rng(0).normal(size=100)
    assert masked_moments(torch.tensor(returns)).varies and not has_spread(returns.mean(), returns.std())
    assert not any(has_spread(0.0, std) for std in (0.0, float("nan"), float("inf")))
