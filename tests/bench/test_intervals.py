"""``tests/bench/intervals.py``: an interval holds the truth as often as it says."""

from __future__ import annotations

from itertools import product
from statistics import geometric_mean, median

import numpy as np
import pytest
from intervals import mean_interval, median_interval


@pytest.mark.parametrize("n", range(1, 15))
def test_the_interval_of_a_median_holds_as_often_as_it_says(n: int) -> None:
    # With the true median at zero, each value is above or below it like a fair coin.
    inside = wider = 0
    low, high, coverage = median_interval(range(n))
    k = int(low) + 1
    assert (low, high) == (k - 1, n - k)
    for side in product((0, 1), repeat=n):
        inside += k <= sum(side) <= n - k
        wider += k + 1 <= sum(side) <= n - k - 1
    assert coverage == pytest.approx(inside / 2**n)
    assert coverage >= 0.95 or k == 1
    assert wider / 2**n < 0.95  # the next narrower one would not do


def test_the_interval_of_a_mean_is_that_of_all_possible_draws() -> None:
    rows = [(1.0, 2.0, 4.0), (3.0, 1.0, 2.0)]
    draws = [[median(draw) for draw in product(row, repeat=3)] for row in rows]
    means = sorted(geometric_mean(pair) for pair in product(*draws))
    exact = means[int(0.025 * len(means))], means[int(0.975 * len(means))]
    assert mean_interval(rows)[:2] == pytest.approx(exact)
    assert mean_interval(rows) == mean_interval(rows)
    assert mean_interval([(2.0,) * 7, (8.0,) * 7]) == pytest.approx((4.0, 4.0, 0.95))
    assert mean_interval([(2.0,), (8.0,)]).coverage == 0.0  # a single turn


def test_the_interval_of_a_mean_holds_the_true_one() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(60):
        low, high, _coverage = mean_interval(rng.lognormal(0.3, 0.1, size=(9, 7)).tolist())
        held += low <= np.exp(0.3) <= high
    assert held >= 54  # of the 57 that 95 % promise
