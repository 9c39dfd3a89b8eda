"""What measured costs and acceptances allow a fixed depth: arithmetic on runs.

Costs are in plain tokens: the time that stock decoding takes per token in the same turn. A turn on
a busy machine then weighs no more than one on a quiet machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean, median
from typing import Any, NamedTuple

from intervals import Interval, mean_interval, median_interval

from llama_mtp.measure.bench import Figures


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


@dataclass(frozen=True)
class Limit:
    """What a fixed depth can do on a class, and what the adaptive depth does there.

    Attributes:
        free: the bound if what a round takes outside of decodes and sampling took no time.
        adaptive: speed-up of the adaptive depth; None where it did not run.
        interval: of ``adaptive`` over the bound.
    """

    name: str
    temp: float
    bound: Bound
    free: float
    adaptive: float | None = None
    interval: Interval | None = None

    def reached(self, ratio: float, interval: Interval) -> Limit:
        """The same with what adaptive reached, and the interval of that ratio."""
        low, high, coverage = interval
        scaled = Interval(low / self.bound.ratio, high / self.bound.ratio, coverage)
        return replace(self, adaptive=ratio, interval=scaled)

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "class": self.name,
            "temperature": self.temp,
            "bound": self.bound.ratio,
            "best_depth": self.bound.depth,
            "bound_free_of_overhead": self.free,
        }
        if self.adaptive is not None and self.interval is not None:
            told["adaptive"] = self.adaptive
            told["adaptive_of_bound"] = self.adaptive / self.bound.ratio
            told["adaptive_of_bound_interval"] = list(self.interval)
        return told


def samples_of(figures: Figures) -> list[Sample]:
    """The mean round of each run at a constant depth."""
    found = []
    for series in figures.series:
        if series.variant in ("plain", "adaptive"):
            continue
        plain = figures.get(series.name, series.temp, "plain")
        for run, last, beside in zip(series.runs, series.counters, plain.runs, strict=True):
            if not last.num_rounds or not beside.rate:
                continue
            scale = beside.rate / last.num_rounds / 1e9  # ns of a run to tokens a round
            decodes = last.target_ns + last.draft_ns
            own = last.rollback_ns + last.native_overhead_ns + last.python_ns
            found.append(
                Sample(
                    series.name,
                    series.temp,
                    int(series.variant),
                    last.mean_acceptance_length,
                    scale * last.target_ns,
                    scale * last.draft_ns,
                    scale * (run.decode_seconds * 1e9 - decodes),
                    scale * own,
                )
            )
    return found


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


def limits_of(figures: Figures, temp: float, deepest: int) -> list[Limit]:
    """What a fixed depth can do and what adaptive does, by class."""
    samples, limits = samples_of(figures), []
    for name in figures.names:
        free = bound(samples, name, temp, deepest, free=True).ratio
        limit = Limit(name, temp, bound(samples, name, temp, deepest), free)
        if "adaptive" in figures.variants:
            ratios = figures.ratios(name, temp, "adaptive")
            limit = limit.reached(median(ratios), median_interval(ratios))
        limits.append(limit)
    return limits


def mean_limit(figures: Figures, temp: float, deepest: int) -> Limit:
    """The geometric mean of :func:`limits_of`, of no depth."""
    limits = limits_of(figures, temp, deepest)
    ratio = geometric_mean(limit.bound.ratio for limit in limits)
    free = geometric_mean(limit.free for limit in limits)
    limit = Limit("geometric mean", temp, Bound(ratio, None), free)
    if "adaptive" in figures.variants:
        interval = mean_interval([figures.ratios(n, temp, "adaptive") for n in figures.names])
        limit = limit.reached(figures.mean_ratio(temp, "adaptive"), interval)
    return limit


def round_costs(figures: Figures) -> dict[int, dict[str, float]]:
    """Medians of what a round at a constant depth costs, in plain tokens of the same turn."""
    samples = samples_of(figures)
    return {
        depth: {
            part: median(getattr(s, part) for s in samples if s.depth == depth)
            for part in ("whole", "target", "draft", "rest", "own")
        }
        for depth in sorted({s.depth for s in samples})
    }
