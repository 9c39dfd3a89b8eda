"""DepthPolicy: driven by a simulator whose true costs and acceptance are known."""

from __future__ import annotations

import copy
import itertools
import random
import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mtp.depth import DepthPolicy

# Median ms of a target decode of 1, 2, 3, ... rows, and a draft step's part of a one-row decode.
CURVES: dict[str, tuple[list[float], float]] = {
    "wide-bf16": ([23.0, 27.8, 33.5, 38.2, 40.2, 41.5, 42.7, 43.9], 0.06),
    "wide-q8_0": ([21.2, 16.1, 19.1, 24.9, 34.0, 34.0, 34.0, 34.0], 0.06),
    "small-bf16": ([7.0, 8.4, 10.2, 11.7, 12.7, 13.6, 14.6, 15.5], 0.2),
    "small-f16": ([6.7, 9.7, 10.0, 10.4, 12.5, 14.0, 15.5, 16.9], 0.2),
    "small-q8_0": ([5.4, 12.8, 15.7, 18.0, 20.9, 21.1, 21.4, 21.6], 0.2),
    "small-q4_0": ([2.5, 4.3, 5.7, 4.0, 6.5, 7.1, 7.7, 8.3], 0.2),
    "small-q4_1": ([5.3, 11.4, 13.8, 16.3, 21.1, 22.2, 23.4, 24.5], 0.2),
}
WEAK = [0.31, 0.44, 0.27]
MIDDLING = [0.60, 0.55, 0.50]
STRONG = [0.90, 0.94, 0.96]
ACCEPTANCE = {"weak": WEAK, "middling": MIDDLING, "strong": STRONG}


class Simulator:
    """Rounds with known costs; the policy sees noise and spikes, ``spent`` is the truth in ms."""

    def __init__(self, curve: str, acceptance: list[float], seed: int) -> None:
        self.rows_ms, self.draft_part = CURVES[curve]
        self.acceptance = acceptance
        self.random = random.Random(seed)
        self.tokens = 0
        self.spent = 0.0
        self.depths: list[int] = []

    def round_ms(self, depth: int) -> float:
        return self.rows_ms[depth] + depth * self.draft_part * self.rows_ms[0]

    def noisy_ns(self, ms: float) -> int:
        spike = 10 if self.random.random() < 0.01 else 1
        return int(ms * 1e6 * self.random.lognormvariate(0, 0.1) * spike)

    def run(self, policy: DepthPolicy, tokens: int) -> float:
        """Generate at least ``tokens`` more and return the true ms a token."""
        start_tokens, start_spent = self.tokens, self.spent
        while self.tokens - start_tokens < tokens:
            depth = policy.choose()
            accepted = 0
            while accepted < depth and self.random.random() < self.acceptance[accepted]:
                accepted += 1
            policy.observe(
                depth + 1,
                self.noisy_ns(self.rows_ms[depth]),
                depth,
                self.noisy_ns(depth * self.draft_part * self.rows_ms[0]),
                accepted + 1,
                accepted,
            )
            self.depths.append(depth)
            self.tokens += accepted + 1
            self.spent += self.round_ms(depth)
        return (self.spent - start_spent) / (self.tokens - start_tokens)

    def best_constant(self, depth_max: int) -> tuple[float, int]:
        """Lowest expected ms a token over the constant depths, 0 included, and that depth."""
        best = (self.round_ms(0), 0)
        tokens = agreed = 1.0
        for depth in range(1, depth_max + 1):
            agreed *= self.acceptance[depth - 1]
            tokens += agreed
            best = min(best, (self.round_ms(depth) / tokens, depth))
        return best


def dropped(policy: DepthPolicy) -> bool:
    """The property, read afresh (a type checker would remember the first answer)."""
    return policy.dropped


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("kind", ACCEPTANCE)
def test_close_to_the_best_constant_depth(curve: str, kind: str) -> None:
    for seed in range(3):
        sim = Simulator(curve, ACCEPTANCE[kind], seed)
        policy = DepthPolicy(3)
        sim.run(policy, 100)
        assert sim.run(policy, 4000) <= 1.05 * sim.best_constant(3)[0], (seed, policy.explain())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    curve=st.sampled_from(sorted(CURVES)),
    acceptance=st.lists(st.floats(0.05, 0.98), min_size=3, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_never_much_slower_than_plain(curve: str, acceptance: list[float], seed: int) -> None:
    sim = Simulator(curve, acceptance, seed)
    assert sim.run(DepthPolicy(3), 3000) <= 1.05 * sim.round_ms(0)


@pytest.mark.parametrize("curve", ["small-q4_0", "small-q4_1", "small-q8_0", "small-f16"])
def test_weak_head_ends_at_plain_decoding(curve: str) -> None:
    sim = Simulator(curve, WEAK, 7)
    policy = DepthPolicy(3)
    assert not dropped(policy)
    assert sim.run(policy, 2000) <= 1.05 * sim.round_ms(0)  # warm-up included
    assert dropped(policy)
    assert sim.depths[-500:].count(0) > 470
    assert "does not pay" in policy.explain()


@pytest.mark.parametrize("depth_max", [4, 7])
@pytest.mark.parametrize("curve", CURVES)
def test_more_depths_cost_little_to_explore(curve: str, depth_max: int) -> None:
    acceptance = [*STRONG, *[0.95] * 4]
    sim = Simulator(curve, acceptance, 3)
    policy = DepthPolicy(depth_max)
    sim.run(policy, 500)
    assert sim.run(policy, 4000) <= 1.05 * sim.best_constant(depth_max)[0]


def test_first_rounds_try_every_depth() -> None:
    sim = Simulator("wide-bf16", STRONG, 0)
    policy = DepthPolicy(3)
    assert policy.choose() == 3
    sim.run(policy, 12)
    while len(sim.depths) < 12:
        sim.run(policy, 1)
    assert set(sim.depths[:12]) == {0, 1, 2, 3}


def test_follows_the_text() -> None:
    sim = Simulator("small-bf16", WEAK, 11)
    policy = DepthPolicy(3)
    sim.run(policy, 1500)
    assert dropped(policy)
    sim.acceptance = STRONG
    sim.run(policy, 1500)  # the longest wait between probes is 1024 tokens
    assert not dropped(policy)
    assert sim.run(policy, 1000) <= 1.05 * sim.best_constant(3)[0]
    sim.acceptance = WEAK
    sim.run(policy, 300)
    assert sim.run(policy, 1000) <= 1.05 * sim.best_constant(3)[0]


def test_follows_the_cost() -> None:
    sim = Simulator("small-bf16", STRONG, 5)
    policy = DepthPolicy(3)
    sim.run(policy, 1000)
    sim.rows_ms, _ = CURVES["small-q4_1"]  # as if a neighbour took the second core
    sim.run(policy, 500)
    assert sim.run(policy, 2000) <= 1.05 * sim.best_constant(3)[0]


def test_probes_back_off() -> None:
    sim = Simulator("small-q4_1", WEAK, 2)
    policy = DepthPolicy(3)
    sim.run(policy, 5000)
    starts = [
        i for i in range(1, len(sim.depths)) if sim.depths[i] and not sim.depths[i - 1] and i > 12
    ]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert 2 <= len(gaps) <= 9
    assert gaps[-1] > 500


def test_rows_nobody_asked_for_are_no_verdict() -> None:
    """Censoring: stopping after k agreed rows equals having drafted only those k, to acceptance."""
    censored, refused = DepthPolicy(3), DepthPolicy(3)
    for _ in range(200):
        censored.observe(4, 1000, 3, 100, 1, 1)
        refused.observe(4, 1000, 3, 100, 2, 1)
    assert censored._accept[0] > 0.95
    assert censored._accept[1:] == DepthPolicy(3)._accept[1:]
    assert refused._accept[0] > 0.95
    assert refused._accept[1] < 0.1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_censored_rows_leave_acceptance_alone(data: st.DataObject) -> None:
    policy = DepthPolicy(4)
    for _ in range(data.draw(st.integers(1, 30))):
        drafted = data.draw(st.integers(0, 4))
        accepted = data.draw(st.integers(0, drafted))
        sampled = data.draw(st.integers(accepted, min(accepted + 1, drafted + 1)))
        before = copy.copy(policy._accept)
        policy.observe(drafted + 1, 5000, drafted, 10, sampled, accepted)
        assert policy._accept[sampled:] == before[sampled:]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_choices_stay_in_range(data: st.DataObject) -> None:
    depth_max = data.draw(st.integers(0, 9))
    depth_min = data.draw(st.integers(0, depth_max))
    policy = DepthPolicy(depth_max, depth_min, adaptive=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 60))):
        if data.draw(st.integers(0, 15)) == 0:
            policy.depth_max = data.draw(st.integers(0, depth_max))
        limit = data.draw(st.none() | st.integers(0, 10))
        depth = policy.choose(limit)
        assert depth == 0 or max(depth_min, 1) <= depth <= policy.depth_max
        assert limit is None or depth <= limit
        drafted = data.draw(st.integers(0, depth))  # a drafter may find less
        accepted = data.draw(st.integers(0, drafted))
        sampled = data.draw(st.integers(accepted, accepted + 1))
        times = st.integers(0, 10**9)
        policy.observe(drafted + 1, data.draw(times), drafted, data.draw(times), sampled, accepted)
        assert policy.explain()


def test_depth_can_be_switched_off_and_on() -> None:
    sim = Simulator("small-bf16", STRONG, 4)
    policy = DepthPolicy(3, 2)
    sim.run(policy, 200)
    policy.depth_max = 1  # below depth_min: nothing left but plain decoding
    before = len(sim.depths)
    sim.run(policy, 200)
    assert set(sim.depths[before:]) == {0}
    assert not policy.dropped
    policy.depth_max = 3
    assert policy.choose() == 3
    sim.run(policy, 100)
    assert policy.choose() == 3


def test_constant_depth() -> None:
    policy = DepthPolicy(3, 2, adaptive=False)
    for _ in range(100):
        assert policy.choose() == 3
        policy.observe(4, 10**9, 3, 10**9, 1, 0)
    assert policy.choose(2) == 2
    assert policy.choose(1) == 0
    assert not dropped(policy)
    policy.depth_max = 0
    assert policy.choose() == 0


def test_a_drafter_that_finds_nothing_is_paid_for() -> None:
    policy = DepthPolicy(3)
    for _ in range(400):
        policy.choose()
        policy.observe(1, 5_000_000, 0, 2_000_000, 1, 0)
    assert policy.choose() == 0


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="depth_min"):
        DepthPolicy(2, 3)
    policy = DepthPolicy(3)
    policy.depth_max = 1
    assert policy.choose() <= 1
    policy.depth_max = 3
    with pytest.raises(ValueError, match="spec_draft_n_max"):
        policy.depth_max = 4


def test_a_round_costs_microseconds() -> None:
    policy = DepthPolicy(3)

    def round_() -> None:
        depth = policy.choose()
        policy.observe(depth + 1, 5_000_000 + depth, depth, 100_000 * depth, depth + 1, depth)

    best = min(timeit.repeat(round_, number=2000, repeat=5)) / 2000
    assert best < 50e-6  # measured 2 to 4 us; a slow machine may take several times that
