"""Rates with confidence intervals."""

from dataclasses import dataclass
from math import sqrt

Z95 = 1.959963984540054
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


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a binomial rate (Wilson 1927), as (low, high) in [0, 1].

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
