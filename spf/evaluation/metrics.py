"""Rates, means and differences with 95 % intervals: the only home of Wilson's and Newcombe's interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import ndtri, stdtrit

Z95 = float(ndtri(0.975))
"""The 97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Rate:
    """A rate `hits / count` in [0, 1]."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % Wilson interval."""
        return wilson_interval(self.hits, self.count)


def wilson_interval(hits: float, count: float) -> tuple[float, float]:
    """The 95 % score interval of a binomial rate (Wilson 1927), as (low, high) in [0, 1].

    `scipy.stats.binomtest` has it for whole numbers only; here both may be fractions, an effective number of prompts.

    Raises:
        ValueError: `count` is not positive or `hits` is outside 0 ... `count`.
    """
    if count <= 0 or not 0 <= hits <= count:
        raise ValueError(f"wilson_interval: {hits} hits of {count} is not a rate")
    rate = hits / count
    spread = Z95**2 / count
    centre = rate + spread / 2
    margin = Z95 * sqrt((rate * (1 - rate) + spread / 4) / count)
    low, high = (centre - margin) / (1 + spread), (centre + margin) / (1 + spread)
    # At 0 and 1 the closed form leaves rounding on the wrong side of the rate itself.
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))


@dataclass(frozen=True)
class Mean:
    """The mean of scores, with its 95 % t-interval (the value itself where there is one score only)."""

    value: float
    interval: tuple[float, float]
    count: int


def mean_interval(scores: Sequence[float]) -> Mean:
    """The mean of scores with its 95 % interval from Student's t distribution; not clipped to the scores' range.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("mean_interval: no scores")
    count, value = len(scores), fmean(scores)
    if count == 1:
        return Mean(value, (value, value), 1)
    margin = float(stdtrit(count - 1, 0.975)) * stdev(scores) / sqrt(count)
    return Mean(value, (value - margin, value + margin), count)


def newcombe_interval(
    a: float, interval_a: Sequence[float], b: float, interval_b: Sequence[float], correlation: float = 0.0
) -> tuple[float, float]:
    """The 95 % interval of the difference a - b of two rates in [0, 1], as (low, high) in [-1, 1].

    Newcombe's square-and-add of the two Wilson intervals (Statistics in Medicine 17, 1998): of independent samples
    without a correlation (page 873, method 10), of paired ones with it (page 2635, method 10).
    """

    def reach(x: float, y: float) -> float:
        return sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    low = a - b - reach(a - interval_a[0], interval_b[1] - b)
    return max(-1.0, low), min(1.0, a - b + reach(interval_a[1] - a, b - interval_b[0]))


def paired_interval(both: float, only_a: float, only_b: float, neither: float) -> tuple[float, float]:
    """The 95 % interval of the difference of two rates on the same prompts, from the counts of pairs.

    The correlation is continuity-corrected where it is positive. The counts may be fractions.
    """
    count = both + only_a + only_b + neither
    hits_a, hits_b = min(both + only_a, count), min(both + only_b, count)
    margins = hits_a * (count - hits_a) * hits_b * (count - hits_b)
    determinant = both * neither - only_a * only_b
    if determinant > 0:
        determinant = max(determinant - count / 2, 0.0)
    phi = determinant / sqrt(margins) if margins > 1e-12 * count**4 else 0.0
    of_a, of_b = wilson_interval(hits_a, count), wilson_interval(hits_b, count)
    return newcombe_interval(hits_a / count, of_a, hits_b / count, of_b, phi)


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two rates on the same prompts.

    difference: rate of a minus rate of b, in [-1, 1]. interval: its 95 % interval. p_value: exact McNemar test,
    two-sided. only_a, only_b: prompts where one is true and not the other.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    only_a: int
    only_b: int
    count: int


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> PairedDifference:
    """Compare two rates measured on the same prompts, in the same order.

    The interval is Newcombe's for paired rates (see paired_interval). The test is McNemar's, exact: under no
    difference `only_a` is binomial(only_a + only_b, 1/2).

    Raises:
        ValueError: the lengths differ, or there are no prompts.
    """
    from scipy.stats import binomtest  # most of a second, so only where it is used

    if len(a) != len(b) or not a:
        raise ValueError(f"paired_difference: needs the same prompts on both sides, got {len(a)} and {len(b)}")
    count = len(a)
    both = sum(x and y for x, y in zip(a, b, strict=True))
    only_a = sum(a) - both
    only_b = sum(b) - both
    interval = paired_interval(both, only_a, only_b, count - both - only_a - only_b)
    discordant = only_a + only_b
    p_value = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return PairedDifference((only_a - only_b) / count, interval, p_value, only_a, only_b, count)
