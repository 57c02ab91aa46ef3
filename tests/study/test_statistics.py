"""Intervals, corrections and power of a study, against scipy.stats and against simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from icegrt.study.statistics import (
    detectable_difference,
    equivalence_margin,
    holm,
    paired_difference,
    paired_power,
    std_interval,
)

NUMBERS = st.floats(-10, 10).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=12))
def test_a_paired_difference_is_the_one_of_scipy(pairs):
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    result = paired_difference(a, b)
    assert math.isclose(result.mean, np.mean(np.subtract(a, b)), abs_tol=1e-12)
    if len({round(x - y, 6) for x, y in pairs}) > 1:  # scipy has no interval without a spread
        expected = stats.ttest_rel(a, b)
        low, high = expected.confidence_interval()
        assert np.allclose([result.low, result.high, result.p_value], [low, high, expected.pvalue], atol=1e-9)


def test_differences_without_spread_have_an_interval_of_width_zero():
    equal, other = paired_difference([1.0, 1.0], [1.0, 1.0]), paired_difference([2.0, 3.0], [1.0, 2.0])
    assert (equal.low, equal.high, equal.p_value) == (0, 0, 1)
    assert (other.low, other.high, other.p_value) == (1, 1, 0)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([1.0, math.nan], [0.0, 1.0])])
def test_what_gives_no_interval_is_refused(a, b):
    with pytest.raises(ValueError):
        paired_difference(a, b)


def test_holm_multiplies_the_smallest_by_all_and_never_decreases():
    # 0.01 x 4, 0.02 x 3, 0.022 x 2 = 0.044 < 0.06, 0.5 x 1
    assert holm([0.5, 0.01, 0.022, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_of_a_standard_deviation_is_that_of_chi_squared():
    low, high = std_interval(2.0, 5)
    assert low == pytest.approx(2 * math.sqrt(4 / stats.chi2.ppf(0.975, 4)))
    assert high == pytest.approx(2 * math.sqrt(4 / stats.chi2.ppf(0.025, 4)))


@pytest.mark.parametrize(("n", "size"), [(3, 1.0), (5, 0.5), (5, 1.5), (10, 1.0), (34, 0.5)])
def test_power_is_that_of_the_noncentral_t_distribution(n, size):
    critical, shift = stats.t.ppf(0.975, n - 1), size * math.sqrt(n)
    expected = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert paired_power(size * 3, 3.0, n) == pytest.approx(expected, abs=1e-6)


def test_the_power_of_no_difference_is_the_level():
    for n in (2, 5, 20):
        assert paired_power(0.0, 1.0, n) == pytest.approx(0.05, abs=1e-6)


def test_the_detectable_difference_has_the_power_and_scales_with_the_spread():
    for n in (2, 5, 34):
        difference = detectable_difference(2.0, n)
        assert paired_power(difference, 2.0, n) == pytest.approx(0.8, abs=1e-6)
        assert difference == pytest.approx(2 * detectable_difference(1.0, n))
    # The textbook's sample size for 0.5 standard deviations is 34 pairs: 33 do not suffice.
    assert detectable_difference(1.0, 34) < 0.5 < detectable_difference(1.0, 33)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_the_margin_shows_equality_in_four_of_five_simulated_studies(n):
    margin = equivalence_margin(1.5, n)
    samples_DN = np.random.default_rng(n).normal(0, 1.5, (20_000, n))
    half_width_D = stats.t.ppf(0.975, n - 1) * samples_DN.std(axis=1, ddof=1) / math.sqrt(n)
    within = (np.abs(samples_DN.mean(axis=1)) + half_width_D < margin).mean()
    assert within == pytest.approx(0.8, abs=0.012)  # four standard errors
