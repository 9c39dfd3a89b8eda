"""How sure a figure is: intervals of medians and of means of medians."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import NamedTuple

import numpy as np
from scipy import stats

_OUTSIDE = 0.025  # chance on either side of a 95 % interval
_DRAWS = 4000


class Interval(NamedTuple):
    """Where a true value lies with the chance ``coverage``."""

    low: float
    high: float
    coverage: float


def median_interval(values: Iterable[float]) -> Interval:
    """The narrowest interval of the median that order statistics allow at 95 %, or the widest.

    The median of whatever the values are drawn from is outside of the k-th smallest to the k-th
    largest only if fewer than k of the n values fall on one side of it: a binomial chance, with
    nothing assumed about their distribution. Below six values even all of them give less than
    95 %, which ``coverage`` says. Raises IndexError for no values.
    """
    ordered = sorted(values)
    n = len(ordered)
    below = stats.binom(n, 0.5)
    k = max(1, int(below.ppf(_OUTSIDE)))
    return Interval(ordered[k - 1], ordered[n - k], float(1.0 - 2.0 * below.cdf(k - 1)))


def mean_interval(rows: Iterable[Sequence[float]]) -> Interval:
    """95 % interval of the geometric mean of the medians of `rows`: a seeded bootstrap.

    The turns of every row are drawn anew, each row by itself; from fewer than six it comes out
    narrower than it should, and single turns have no interval (``coverage`` 0). Raises ValueError
    for an empty row.
    """
    rows = list(rows)
    if max(map(len, rows)) == 1:
        mean = geometric_mean(row[0] for row in rows)
        return Interval(mean, mean, 0.0)

    def mean_of_medians(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        logs = [np.log(np.median(row, axis=axis)) for row in drawn]
        return np.exp(np.mean(logs, axis=0))

    low, high = stats.bootstrap(
        rows,
        mean_of_medians,
        n_resamples=_DRAWS,
        confidence_level=1.0 - 2.0 * _OUTSIDE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(1),
    ).confidence_interval
    return Interval(float(low), float(high), 1.0 - 2.0 * _OUTSIDE)
