"""Statistics of a study: paired differences over seeds, correction for several contrasts, and power.

Suffix `_S`: one entry per seed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, special

__all__ = [
    "ALPHA",
    "POWER",
    "PairedDifference",
    "detectable_difference",
    "equivalence_margin",
    "holm",
    "paired_difference",
    "paired_power",
    "std_interval",
]

ALPHA, POWER = 0.05, 0.8


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The mean of a - b over seeds, with its interval by Student's t.

    Attributes:
        seeds: number of pairs.
        mean: mean difference.
        std: standard deviation of the differences, with n - 1.
        low: lower end of the interval.
        high: upper end of the interval.
        p_value: two-sided p-value of a difference of 0.
    """

    seeds: int
    mean: float
    std: float
    low: float
    high: float
    p_value: float


def paired_difference(a_S: Sequence[float], b_S: Sequence[float], confidence: float = 1 - ALPHA) -> PairedDifference:
    """Return the mean of a - b with its interval, paired by seed.

    The interval is mean ± t(n - 1) std / sqrt(n). Differences without any spread have an interval of width 0.

    Args:
        a_S: one number per seed.
        b_S: the same seeds, in the same order.
        confidence: of the interval.

    Raises:
        ValueError: unequal lengths, fewer than two seeds, or a number that is not finite.
    """
    if len(a_S) != len(b_S) or len(a_S) < 2:
        raise ValueError(f"{len(a_S)} and {len(b_S)} seeds: a paired interval needs the same seeds, at least two")
    difference_S = np.asarray(a_S, float) - np.asarray(b_S, float)
    if not np.isfinite(difference_S).all():
        raise ValueError("the numbers must be finite")
    n = len(difference_S)
    mean, std = float(difference_S.mean()), float(difference_S.std(ddof=1))
    error = std / math.sqrt(n)
    half_width = _t_quantile(0.5 + confidence / 2, n) * error
    if error > 0:
        p_value = float(2 * special.stdtr(n - 1, -abs(mean) / error))
    else:
        p_value = 1.0 if mean == 0 else 0.0
    return PairedDifference(n, mean, std, mean - half_width, mean + half_width, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order of the arguments.

    The i-th smallest of k p-values is multiplied by k - i + 1; the results never decrease, and are at most 1. (Holm
    1979, A simple sequentially rejective multiple test procedure.)
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def std_interval(std: float, n: int, confidence: float = 1 - ALPHA) -> tuple[float, float]:
    """Return the interval of a standard deviation of n normal numbers, by the chi-squared distribution."""
    tail = (1 - confidence) / 2
    # A quantile of the chi-squared distribution is twice one of the gamma distribution.
    low, high = (math.sqrt((n - 1) / 2 / float(special.gammaincinv((n - 1) / 2, q))) for q in (1 - tail, tail))
    return std * low, std * high


def paired_power(difference: float, std: float, n: int, alpha: float = ALPHA) -> float:
    """Return the probability that the two-sided paired t-test of n seeds finds a true difference.

    The test finds it if sqrt(n) |mean| > t s, where s is the sample's standard deviation. The mean is normal and
    independent of s, so with shift = sqrt(n) difference / std, and s in units of std, the probability is
    E[Phi(shift - t s) + Phi(-shift - t s)].

    Args:
        difference: true mean of the differences.
        std: true standard deviation of the differences.
        n: number of pairs, at least two.
        alpha: level of the test.
    """
    critical, shift = _t_quantile(1 - alpha / 2, n), math.sqrt(n) * difference / std
    s_K, weight_K = _sample_std(n)
    return float(weight_K @ (special.ndtr(shift - critical * s_K) + special.ndtr(-shift - critical * s_K)))


def detectable_difference(std: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """Return the smallest true difference that the paired t-test of n seeds finds with probability `power`.

    Args:
        std: standard deviation of the differences between pairs.
        n: number of pairs, at least two.
        power: wanted probability.
        alpha: level of the two-sided test.
    """
    return std * _root(lambda size: paired_power(size, 1.0, n, alpha) - power)


def equivalence_margin(std: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """Return the smallest margin within which the interval lies with probability `power`, if nothing differs.

    The interval mean ± t s / sqrt(n) lies within ± margin if |mean| < margin - t s / sqrt(n); with s in units of std
    the probability is E[max(0, 2 Phi(sqrt(n) margin / std - t s) - 1)].

    Args:
        std: standard deviation of the differences between pairs.
        n: number of pairs, at least two.
        power: wanted probability.
        alpha: 1 - confidence of the interval.
    """
    critical = _t_quantile(1 - alpha / 2, n)
    s_K, weight_K = _sample_std(n)

    def probability(margin: float) -> float:
        return float(weight_K @ np.maximum(0.0, 2 * special.ndtr(margin * math.sqrt(n) - critical * s_K) - 1))

    return std * _root(lambda margin: probability(margin) - power)


def _t_quantile(probability: float, n: int) -> float:
    return float(special.stdtrit(n - 1, probability))


@functools.lru_cache
def _sample_std(n: int, nodes: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of an average over the standard deviation of n standard normal numbers.

    Its density is proportional to s^(v - 1) exp(-v s^2 / 2) with v = n - 1. Gauss-Legendre, up to a quantile of 1e-14.

    Shape:
        (K,), K nodes.
    """
    v = n - 1
    largest = math.sqrt(2 * float(special.gammainccinv(v / 2, 1e-14)) / v)
    x_K, weight_K = np.polynomial.legendre.leggauss(nodes)
    s_K = largest * (x_K + 1) / 2
    log_density_K = (v - 1) * np.log(s_K) - v * s_K**2 / 2
    weight_K = weight_K * np.exp(log_density_K - log_density_K.max())
    return s_K, weight_K / weight_K.sum()


def _root(increasing: Callable[[float], float]) -> float:
    return float(optimize.brentq(increasing, 0.0, 1000.0, xtol=1e-9))
