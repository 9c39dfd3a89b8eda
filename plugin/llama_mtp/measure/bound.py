"""What measured costs and acceptances allow, and how sure a figure is: arithmetic on runs.

Costs are in plain tokens: the time that stock decoding takes per token in the same turn. A turn on
a busy machine then weighs no more than one on a quiet machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb
from statistics import median
from typing import NamedTuple

import numpy as np

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
    n, k = len(ordered), 1
    outside = 0.5**n
    while outside + comb(n, k) * 0.5**n <= _OUTSIDE:
        outside += comb(n, k) * 0.5**n
        k += 1
    return Interval(ordered[k - 1], ordered[n - k], 1.0 - 2.0 * outside)


def mean_interval(rows: Iterable[Sequence[float]]) -> Interval:
    """95 % interval of the geometric mean of the medians of `rows`: a seeded bootstrap.

    The turns of every row are drawn anew, each row by itself; from fewer than six it comes out
    narrower than it should, and single turns have no interval (``coverage`` 0). Raises ValueError
    for an empty row.
    """
    rows = list(rows)
    rng = np.random.default_rng(1)
    logs = []
    for row in rows:
        drawn = np.asarray(row)[rng.integers(len(row), size=(_DRAWS, len(row)))]
        logs.append(np.log(np.median(drawn, axis=1)))
    low, high = np.quantile(np.mean(logs, axis=0), (_OUTSIDE, 1.0 - _OUTSIDE))
    coverage = 1.0 - 2.0 * _OUTSIDE if max(map(len, rows)) > 1 else 0.0
    return Interval(float(np.exp(low)), float(np.exp(high)), coverage)


class Sample(NamedTuple):
    """The mean round of one run at a constant depth; costs in plain tokens of the same turn.

    ``own`` is the part of ``rest`` that is neither decoding nor sampling: this package's.
    """

    name: str
    temp: float
    depth: int
    tokens: float
    target: float
    draft: float
    rest: float
    own: float

    @property
    def whole(self) -> float:
        return self.target + self.draft + self.rest


class Bound(NamedTuple):
    """The speed-up of the best fixed depth by costs and acceptances; depth 0 is stock itself."""

    ratio: float
    depth: int | None  # None of a mean over several prompts


def bound(
    samples: Sequence[Sample], name: str, temp: float, deepest: int, *, free: bool = False
) -> Bound:
    """The best that a fixed depth up to `deepest` can do on class `name` at `temp`.

    What a round costs is the median over all runs of that depth at that temperature (sampling
    depends on it): of whole rounds, as medians of their parts would leave out the noise that hits
    now one part and now another. `free` leaves out what is this package's own. Added is what drafts
    of the class cost beyond those of all, as the first draft of a run also reads the prompt. Tokens
    per round are those of the class: 1 + p1 + p1 p2 + ... of its acceptance by position, with what
    the last round of a run loses at its end.

    Depth 0 costs what stock costs, not what a token through the session costs: what that is more
    counts against us and must not lower the bound.
    """
    best = Bound(1.0, 0)
    for depth in sorted({s.depth for s in samples if 0 < s.depth <= deepest}):
        same = [s for s in samples if s.depth == depth]
        tokens = [s.tokens for s in same if s.name == name and s.temp == temp]
        if not tokens:
            continue
        cost = (
            median(s.whole - (s.own if free else 0.0) for s in same if s.temp == temp)
            + median(s.draft for s in same if s.name == name)
            - median(s.draft for s in same)
        )
        if median(tokens) / cost > best.ratio:
            best = Bound(median(tokens) / cost, depth)
    return best
