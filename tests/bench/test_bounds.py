"""``tests/bench/bounds.py``: bounds against a simulation whose costs are known."""

from __future__ import annotations

import random
from itertools import product
from statistics import geometric_mean, median

import numpy as np
import pytest
from bounds import Sample, bound, limits_of, mean_limit, round_costs, samples_of

from llama_mtp.engine.stats import SpecStats
from llama_mtp.measure.bench import Figures, Series
from llama_mtp.measure.pairs import Run

TARGET = {0: 0.8, 1: 1.3, 2: 1.25, 3: 1.4, 4: 1.41}  # by depth; two drafts are cheaper than one
STEP, OWN = 0.08, 0.02
REST = {0.0: 0.05, 0.8: 0.09}
PROMPT = {"sure": 0.0, "fair": 0.05, "never": 0.05}  # what reading it adds to a draft of the class
ACCEPT = {"sure": (0.95, 0.9, 0.85, 0.8), "fair": (0.6, 0.3, 0.2, 0.1), "never": (0.1, 0, 0, 0)}


def draft_cost(name: str, depth: int) -> float:
    return STEP * depth + PROMPT[name] * bool(depth)


def cost(name: str, depth: int, temp: float) -> float:
    """A round, in plain tokens."""
    return TARGET[depth] + draft_cost(name, depth) + REST[temp]


def simulated(turns: int = 15) -> tuple[Figures, dict[tuple[str, float, int], list[int]]]:
    """Constant depths on a machine whose load changes from turn to turn, and their rounds by turn.

    A round in a hundred of one run in seven takes ten times as long.
    """
    rng = random.Random(3)
    series, rounds = [], {}
    for name, temp in product(ACCEPT, REST):
        loads = [rng.uniform(1.0, 3.0) * 1e7 for _ in range(turns)]  # ns of a plain token
        text = tuple(range(192))
        runs = tuple(Run(text, 0.1, 191 * load / 1e9) for load in loads)
        series.append(Series(name, temp, "plain", runs, (SpecStats(),) * turns))
        for depth in TARGET:
            found, counters = [], []
            for turn, load in enumerate(loads):
                stats, spent, left = SpecStats(), 0, 191
                while left:
                    accepted = 0
                    while accepted < depth and rng.random() < ACCEPT[name][accepted]:
                        accepted += 1
                    spike = 10 if turn % 7 == 3 and rng.random() < 0.01 else 1
                    sampled = min(accepted + 1, left)
                    times = {
                        "target_ns": round(TARGET[depth] * load * spike),
                        "draft_ns": round(draft_cost(name, depth) * load),
                        "native_overhead_ns": round(OWN * load),
                    }
                    spent += sum(times.values()) + round((REST[temp] - OWN) * load)
                    stats.observe_round(depth, sampled, min(accepted, sampled), **times)
                    left -= sampled
                found.append(Run(text, 0.1, spent / 1e9))
                counters.append(stats)
            series.append(Series(name, temp, depth, tuple(found), tuple(counters)))
            rounds[name, temp, depth] = [stats.num_rounds for stats in counters]
    return Figures(series), rounds


def test_costs_are_in_plain_tokens_of_the_same_turn() -> None:
    stats = SpecStats()
    stats.observe_round(1, 2, 1, target_ns=3000, draft_ns=2000, sample_ns=1000)
    rest = {"rollback_ns": 200, "native_overhead_ns": 200, "python_ns": 600}
    stats.observe_round(1, 1, 0, target_ns=5000, **rest)
    plain = tuple(Run((1, 2, 3), 0.1, seconds) for seconds in (2.0, 8.0))
    mtp = tuple(Run((1, 2, 3), 0.1, seconds) for seconds in (1.0, 4.0))
    first, second = samples_of(
        Figures(
            [
                Series("a", 0.0, "plain", plain, (SpecStats(),) * 2),
                Series("a", 0.0, 1, mtp, (stats,) * 2),
            ]
        )
    )
    assert first[:4] == second[:4] == ("a", 0.0, 1, 1.5)
    # A plain token took 1 s in the first turn and 4 s in the second; both MTP runs the same ns.
    assert first.target == pytest.approx(4000e-9)
    assert first.draft == pytest.approx(1000e-9)
    assert first.rest == pytest.approx(0.5 - 5000e-9)
    assert first.own == pytest.approx(500e-9)
    assert second.target == pytest.approx(1000e-9)
    assert second.rest == pytest.approx(0.5 - 1250e-9)


def test_the_bound_is_the_best_that_a_simulation_without_noise_reaches() -> None:
    found, rounds = simulated()
    for temp in REST:
        depths = {}
        for limit in limits_of(found, temp, deepest=3):
            brute = {0: 1.0}  # depth 0 is stock, whatever a token through the session costs
            formula = {0: 1.0}
            for depth in (1, 2, 3):
                taken = rounds[limit.name, temp, depth]
                brute[depth] = median(191 / n for n in taken) / cost(limit.name, depth, temp)
                accept = ACCEPT[limit.name][:depth]
                tokens = 1 + sum(np.cumprod(accept))
                formula[depth] = tokens / cost(limit.name, depth, temp)
            best = max(brute, key=lambda depth: brute[depth])
            assert limit.bound == (pytest.approx(brute[best], rel=1e-4), best)
            assert limit.bound.ratio == pytest.approx(max(formula.values()), rel=0.03)
            whole = cost(limit.name, best, temp)
            free = brute[best] * whole / (whole - OWN) if best else 1.0
            assert limit.free == pytest.approx(free, rel=1e-4)
            assert limit.adaptive is None
            depths[limit.name] = limit.bound.depth
        assert depths == {"sure": 3, "fair": 2, "never": 0}
        mean = geometric_mean(limit.bound.ratio for limit in limits_of(found, temp, 3))
        assert mean_limit(found, temp, 3).bound == (pytest.approx(mean), None)
    assert limits_of(found, 0.0, deepest=1)[0].bound.depth == 1
    wanted = {"whole": 1.53, "target": 1.25, "draft": 0.21, "rest": 0.07, "own": 0.02}
    assert round_costs(found)[2] == pytest.approx(wanted, abs=0.021)  # rest: of either temperature


def test_noise_that_hits_now_one_part_and_now_another_counts_as_cost() -> None:
    parts = ((1.1, 0.1, 0.1), (0.6, 0.6, 0.1), (0.6, 0.1, 0.6))
    samples = [Sample("a", 0.0, 1, 1.95, *part, 0.05) for part in parts]
    assert bound(samples, "a", 0.0, 1) == (pytest.approx(1.95 / 1.3), 1)
    assert bound(samples, "a", 0.0, 1, free=True) == (pytest.approx(1.95 / 1.25), 1)
    assert bound(samples, "b", 0.0, 1) == bound(samples, "a", 0.8, 1) == (1.0, 0)


def test_adaptive_is_compared_with_the_bound_of_its_class() -> None:
    found, _ = simulated(7)
    plain = found.get("sure", 0.0, "plain")
    speeds = (1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8)
    runs = tuple(
        Run(run.tokens, 0.1, run.decode_seconds / speed)
        for run, speed in zip(plain.runs, speeds, strict=True)
    )
    one = [series for series in found.series if (series.name, series.temp) == ("sure", 0.0)]
    one.append(Series("sure", 0.0, "adaptive", runs, one[1].counters))
    (limit,) = limits_of(Figures(one), 0.0, 3)
    assert limit.adaptive == pytest.approx(1.5)
    assert limit.interval is not None
    wanted = 1.2 / limit.bound.ratio, 1.8 / limit.bound.ratio, 1 - 2 / 2**7
    assert limit.interval == pytest.approx(wanted)
    for told in (limit.to_dict(), mean_limit(Figures(one), 0.0, 3).to_dict()):
        assert told["adaptive_of_bound"] == pytest.approx(1.5 / limit.bound.ratio)
