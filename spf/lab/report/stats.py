"""Figures over seeds: mean and spread, and paired differences that know their seeds share the prompts.

The intervals themselves are spf.evaluation.metrics'.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spf.evaluation.metrics import Z95, paired_interval


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds (None for one seed)."""

    mean: float
    sd: float | None
    seeds: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of what was measured; None where nothing was."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds with its 95 % interval (None where it is not known)."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __neg__(self) -> Difference:
        low, high = (None if v is None else -v for v in (self.high, self.low))
        return Difference(-self.mean, low, high, self.seeds)


def held_to(change: Difference | None, allowed: float) -> str:
    """The status of a bar for a change for the worse: a sign of tables.SIGNS.

    met: the whole interval is within the bar; unclear: the mean is, the interval is not or is not known; missed: the
    mean is beyond it; unknown: nothing to compare.
    """
    if change is None:
        return "unknown"
    if change.mean > allowed + 1e-9:
        return "missed"
    return "met" if change.high is not None and change.high <= allowed + 1e-9 else "unclear"


def normal_margin(deviation: float, count: int) -> float:
    """Half the width of a mean's 95 % interval from the normal distribution; `deviation` is that of one score."""
    return Z95 * deviation / math.sqrt(count)


def normal_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of scores in [-1, 1], and the ends of its normal 95 % interval; of a single score the whole range."""
    mean = statistics.fmean(scores)
    margin = normal_margin(statistics.stdev(scores), len(scores)) if len(scores) > 1 else 2.0
    return mean, mean - margin, mean + margin


def pooled_difference(ours: Sequence[str], theirs: Sequence[str]) -> Difference:
    """The share of 1 in ``ours`` less that in ``theirs``, on the same prompts, with a 95 % interval.

    ours, theirs: one text of 0 and 1 a seed, all over the same n prompts in the same order.
    The interval is that of paired shares at the effective number of pairs: the seeds share their prompts, so n times
    the number of seeds is divided by the design effect, the variance of the mean with prompts as clusters over that
    with independent pairs, held between 1 and the number of seeds. It covers the choice of prompts; the spread over
    seeds is reported beside it.

    Raises:
        ValueError: the texts differ in number or length.
    """
    lengths = {len(text) for text in (*ours, *theirs)}
    if len(ours) != len(theirs) or len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"paired verdicts must cover the same prompts; their counts are {sorted(lengths)}")
    a, b = (np.array([[bit == "1" for bit in text] for text in side]) for side in (ours, theirs))
    change = a.astype(float) - b
    seeds, n = change.shape
    effect = float(seeds)
    naive = change.var() / max(1, change.size - 1)
    if naive > 0 and n > 1:
        effect = min(max(change.mean(0).var() / (n - 1) / naive, 1.0), float(seeds))
    counts = ((a & b).sum(), (a & ~b).sum(), (b & ~a).sum(), (~a & ~b).sum())
    low, high = paired_interval(*(float(count) / effect for count in counts))
    return Difference(float(change.mean()), low, high, seeds)
