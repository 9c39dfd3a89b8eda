"""Every depth against plain decoding on one file: the measurements of ``llama-mtp bench``.

All variants run in turn on the same prompt, again and again (A B C, B C A, ...), so that a noisy
machine disturbs all alike. What compares them is the ratio to the plain run of the same turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any, Literal

from ..engine.stats import SpecStats
from ..errors import LlamaMtpError
from .bound import Bound, Interval, Sample, bound, mean_interval, median_interval
from .pairs import PROMPTS, Run, chat_tokens, generate

if TYPE_CHECKING:
    from ..llama import Llama

Variant = int | Literal["plain", "adaptive"]  # a number is a constant depth

DEPTHS: tuple[Variant, ...] = (1, 2, 3, 4, "adaptive")
PROMPT_TOKENS = 512  # of the text that prompt processing is timed on, where the context has room
GENERATIONS = 2  # of every new object that measure_fresh() looks at
PHASES = {
    "target decode": "target_ns",
    "draft decodes": "draft_ns",
    "sampling": "sample_ns",
    "rollback": "rollback_ns",
    "native rest": "native_overhead_ns",
    "Python rest": "python_ns",
}


def parse_depths(text: str) -> tuple[Variant, ...]:
    """Depths of a list such as ``1,2,adaptive``; LlamaMtpError where it says something else."""
    depths: list[Variant] = []
    for word in text.split(","):
        word = word.strip()
        if word == "adaptive":
            depths.append("adaptive")
        elif word.isdecimal() and int(word) <= 64:
            depths.append(int(word))
        else:
            raise LlamaMtpError(
                f"--depths has {word!r}; list numbers up to 64 and 'adaptive', as in 1,2,adaptive."
            )
    return tuple(dict.fromkeys(depths))


@dataclass(frozen=True)
class Series:
    """One prompt class, temperature and variant: its runs in the order of the turns."""

    name: str
    temp: float
    variant: Variant
    runs: tuple[Run, ...]
    counters: tuple[SpecStats, ...]  # of each run; empty ones for plain

    @property
    def stats(self) -> SpecStats:
        """Counters of all runs together."""
        total = SpecStats()
        for one in self.counters:
            total.add(one)
        return total

    @property
    def tokens(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        return [run.rate for run in self.runs]

    @property
    def rate(self) -> float:
        return median(self.rates)

    def ratios(self, plain: Series) -> list[float]:
        """Speed of each run over that of the plain run of the same turn; 1 where nothing ran."""
        pairs = zip(self.rates, plain.rates, strict=True)
        return [mine / theirs if theirs and mine else 1.0 for mine, theirs in pairs]

    def same_tokens(self, plain: Series) -> bool:
        pairs = zip(self.runs, plain.runs, strict=True)
        return all(mine.tokens == theirs.tokens for mine, theirs in pairs)


@dataclass(frozen=True)
class Prompt:
    """One long prompt from an empty context, by turn, in seconds.

    Attributes:
        n_tokens: of the prompt.
        plain: to the first token.
        mtp: the same with MTP.
        catch_up: what the draft's first decode, which reads the prompt, takes beyond a later one.
            It comes after the first token.
    """

    n_tokens: int
    plain: tuple[float, ...]
    mtp: tuple[float, ...]
    catch_up: tuple[float, ...]

    @property
    def plain_rate(self) -> float:
        """Prompt tokens per second."""
        return self.n_tokens / median(self.plain)

    @property
    def mtp_rate(self) -> float:
        return self.n_tokens / median(self.mtp)

    @property
    def ratios(self) -> list[float]:
        """Time to the first token with MTP over that without, by turn; above 1 MTP is slower."""
        return [m / p for m, p in zip(self.mtp, self.plain, strict=True)]

    @property
    def catch_up_shares(self) -> list[float]:
        """The catch-up over the time to the first token without MTP, by turn."""
        return [c / p for c, p in zip(self.catch_up, self.plain, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.n_tokens,
            "seconds_to_first_token_plain": list(self.plain),
            "seconds_to_first_token_mtp": list(self.mtp),
            "seconds_of_catch_up": list(self.catch_up),
            "ratio": median(self.ratios),
            "ratio_interval": list(median_interval(self.ratios)),
            "catch_up_share": median(self.catch_up_shares),
        }


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


@dataclass(frozen=True)
class Figures:
    """Series class by class, temperature by temperature, plain first."""

    series: list[Series]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(series.name for series in self.series))

    @property
    def temps(self) -> list[float]:
        return list(dict.fromkeys(series.temp for series in self.series))

    @property
    def variants(self) -> list[Variant]:
        return list(dict.fromkeys(series.variant for series in self.series))

    def get(self, name: str, temp: float, variant: Variant) -> Series:
        """The series of these; KeyError if there is none."""
        for series in self.series:
            if (series.name, series.temp, series.variant) == (name, temp, variant):
                return series
        raise KeyError((name, temp, variant))

    def ratios(self, name: str, temp: float, variant: Variant) -> list[float]:
        """Speed-up of a variant on one class by turn."""
        return self.get(name, temp, variant).ratios(self.get(name, temp, "plain"))

    def ratio(self, name: str, temp: float, variant: Variant) -> float:
        """Median speed-up of a variant on one class."""
        return median(self.ratios(name, temp, variant))

    def mean_ratio(self, temp: float, variant: Variant) -> float:
        """Geometric mean of the classes' speed-ups."""
        return geometric_mean(self.ratio(name, temp, variant) for name in self.names)

    def mean_interval(self, temp: float, variant: Variant) -> Interval:
        """Of :meth:`mean_ratio`."""
        return mean_interval([self.ratios(name, temp, variant) for name in self.names])

    def stats(self, variant: Variant, temp: float | None = None) -> SpecStats:
        """Counters of a variant over all classes, at one temperature or all."""
        total = SpecStats()
        for series in self.series:
            if series.variant == variant and temp in (None, series.temp):
                total.add(series.stats)
        return total

    def samples(self) -> list[Sample]:
        """The mean round of each run at a constant depth, for :func:`~.bound.bound`."""
        found = []
        for series in self.series:
            if series.variant in ("plain", "adaptive"):
                continue
            plain = self.get(series.name, series.temp, "plain")
            for run, last, beside in zip(series.runs, series.counters, plain.runs, strict=True):
                if last.num_rounds and beside.rate:
                    scale = beside.rate / last.num_rounds / 1e9  # ns of a run to tokens a round
                    decodes = last.target_ns + last.draft_ns
                    found.append(
                        Sample(
                            series.name,
                            series.temp,
                            int(series.variant),
                            last.mean_acceptance_length,
                            scale * last.target_ns,
                            scale * last.draft_ns,
                            scale * (run.decode_seconds * 1e9 - decodes),
                            scale * (last.rollback_ns + last.native_overhead_ns + last.python_ns),
                        )
                    )
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Every series without its tokens, in types that JSON knows; times in ns."""
        rows = []
        for series in self.series:
            plain = self.get(series.name, series.temp, "plain")
            ratios = series.ratios(plain)
            rows.append(
                {
                    "class": series.name,
                    "temperature": series.temp,
                    "depth": series.variant,
                    "tokens": series.tokens,
                    "tokens_per_second": series.rates,
                    "median_tokens_per_second": series.rate,
                    "ratios": ratios,
                    "ratio": median(ratios),
                    "ratio_interval": list(median_interval(ratios)),
                    "same_tokens": series.same_tokens(plain),
                    **series.stats.as_dict(),
                }
            )
        return rows

    def mean_rows(self) -> list[dict[str, Any]]:
        """The means over all classes, in types that JSON knows."""
        return [
            {
                "temperature": temp,
                "depth": variant,
                "ratio": self.mean_ratio(temp, variant),
                "ratio_interval": list(self.mean_interval(temp, variant)),
            }
            for temp in self.temps
            for variant in self.variants
            if variant != "plain"
        ]


@dataclass(frozen=True)
class Sweep(Figures):
    """All that was measured on one pair of objects.

    Attributes:
        prompt: prompt processing.
        memory: bytes of the object with MTP by context, part and device.
        added_memory: bytes of its buffers less those of stock.
        deepest: bound on the adaptive depth.
        synthetic: chances that a coin accepted the draft at each position, in place of the model.
            All text is then nonsense, and no speed here is one of the model.
        about: file, versions, threads.
    """

    prompt: Prompt
    memory: Mapping[str, int]
    added_memory: int
    deepest: int
    synthetic: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def limits(self, temp: float) -> list[Limit]:
        """What a fixed depth can do and what adaptive does, by class."""
        samples, limits = self.samples(), []
        for name in self.names:
            found = bound(samples, name, temp, self.deepest)
            free = bound(samples, name, temp, self.deepest, free=True).ratio
            limit = Limit(name, temp, found, free)
            if "adaptive" in self.variants:
                ratios = self.ratios(name, temp, "adaptive")
                limit = limit.reached(median(ratios), median_interval(ratios))
            limits.append(limit)
        return limits

    def mean_limit(self, temp: float) -> Limit:
        """The geometric mean of :meth:`limits`, of no depth."""
        limits = self.limits(temp)
        ratio = geometric_mean(limit.bound.ratio for limit in limits)
        free = geometric_mean(limit.free for limit in limits)
        limit = Limit("geometric mean", temp, Bound(ratio, None), free)
        if "adaptive" in self.variants:
            mean, interval = self.mean_ratio(temp, "adaptive"), self.mean_interval(temp, "adaptive")
            limit = limit.reached(mean, interval)
        return limit

    def round_costs(self) -> dict[int, dict[str, float]]:
        """Medians of what a round at a constant depth costs, in plain tokens of the same turn."""
        samples = self.samples()
        return {
            depth: {
                part: median(getattr(s, part) for s in samples if s.depth == depth)
                for part in ("whole", "target", "draft", "rest", "own")
            }
            for depth in sorted({s.depth for s in samples})
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokens, in types that JSON knows; times in seconds or ns."""
        return {
            **self.about,
            "meaningless": bool(self.synthetic),
            "synthetic": list(self.synthetic),
            "series": self.rows(),
            "means": self.mean_rows(),
            "bounds": [limit.to_dict() for temp in self.temps for limit in self.limits(temp)],
            "mean_bounds": [self.mean_limit(temp).to_dict() for temp in self.temps],
            "round_costs_in_plain_tokens": self.round_costs(),
            "prompt": self.prompt.to_dict(),
            "memory": dict(self.memory),
            "added_memory": self.added_memory,
        }


@dataclass(frozen=True)
class Fresh:
    """The first generations of new objects, each against the same one of a new stock object.

    Attributes:
        generations: figures of the first generation, of the second, ..; variants are plain and
            adaptive.
        synthetic, about: as in :class:`Sweep`.
    """

    generations: tuple[Figures, ...]
    synthetic: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokens, in types that JSON knows; times in ns."""
        return {
            **self.about,
            "meaningless": bool(self.synthetic),
            "synthetic": list(self.synthetic),
            "generations": [
                {"series": figures.rows(), "means": figures.mean_rows()}
                for figures in self.generations
            ],
        }


def phases(stats: SpecStats) -> dict[str, float]:
    """Microseconds of each part of a round, by what it is; empty before the first round."""
    if not stats.num_rounds:
        return {}
    return {
        name: getattr(stats, counter) / stats.num_rounds / 1000 for name, counter in PHASES.items()
    }


@dataclass(frozen=True)
class Course:
    """What is to be measured on a pair of objects of one file."""

    plain: Llama
    mtp: Llama
    names: Sequence[str]
    temps: Sequence[float]
    depths: Sequence[Variant]
    max_tokens: int
    repeats: int
    go_on: bool = False  # past the end of the text

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Plain, and the depths that this file can draft."""
        session = self.mtp._session
        most = session.setup.depth if session is not None else 0
        return ("plain", *(d for d in self.depths if d == "adaptive" or int(d) <= most))

    @property
    def n_runs(self) -> int:
        """Runs of :meth:`measure`."""
        return len(self.names) * len(self.temps) * len(self.variants) * self.repeats

    def measure(self, done: Callable[[str], None] = lambda text: None) -> Iterator[list[Series]]:
        """Yield the series of one class after the other; ``done`` is called after each run.

        A short untimed run of every variant comes first. Runs of one turn have one seed.
        """
        warm_up = chat_tokens(self.plain, "Count from one to ten.")
        for variant in self.variants:
            self._run(variant, warm_up, 16, 0.0, 1)
        for name in self.names:
            prompt = chat_tokens(self.plain, PROMPTS[name])
            found: list[Series] = []
            for temp in self.temps:
                runs: dict[Variant, list[Run]] = {variant: [] for variant in self.variants}
                counters: dict[Variant, list[SpecStats]] = {v: [] for v in self.variants}
                for turn in range(self.repeats):
                    first = turn % len(self.variants)
                    for variant in self.variants[first:] + self.variants[:first]:
                        run, last = self._run(variant, prompt, self.max_tokens, temp, 1 + turn)
                        runs[variant].append(run)
                        counters[variant].append(last)
                        done(f"{name}, temperature {temp:g}, depth {variant}")
                found += [
                    Series(name, temp, variant, tuple(runs[variant]), tuple(counters[variant]))
                    for variant in self.variants
                ]
            yield found

    def _run(
        self, variant: Variant, prompt: Sequence[int], max_tokens: int, temp: float, seed: int
    ) -> tuple[Run, SpecStats]:
        llm = self.plain if variant == "plain" else self.mtp
        constant = variant not in ("plain", "adaptive")
        with llm.spec_constant_depth(int(variant)) if constant else nullcontext():
            run = generate(llm, prompt, max_tokens, temp=temp, seed=seed, go_on=self.go_on)
        return run, (llm.spec_stats.last if variant != "plain" else None) or SpecStats()

    def time_prompt(self) -> Prompt:
        """Time one long text in turn, plain and with MTP; the first turn is not kept."""
        text = "\n".join(PROMPTS.values()) * 8
        most = min(PROMPT_TOKENS, self.plain.n_ctx() - 32)
        prompt = self.plain.tokenize(text.encode())[:most]
        session = self.mtp._session
        depth = min(1, session.setup.depth) if session is not None else 0
        times: dict[bool, list[float]] = {False: [], True: []}
        catch_up = []
        for turn in range(self.repeats + 1):
            for with_mtp in (False, True) if turn % 2 else (True, False):
                llm = self.mtp if with_mtp else self.plain
                with llm.spec_constant_depth(depth) if with_mtp else nullcontext():
                    llm.reset()
                    start = time.perf_counter()
                    stream = llm.generate(prompt, temp=0.0)
                    next(stream)
                    took = time.perf_counter() - start
                    if turn:
                        times[with_mtp].append(took)
                    if turn and with_mtp:
                        catch_up.append(_catch_up(stream, llm.spec_stats))
                    stream.close()
        return Prompt(len(prompt), tuple(times[False]), tuple(times[True]), tuple(catch_up))


def _catch_up(stream: Iterator[int], stats: SpecStats) -> float:
    """Seconds that the first draft after a prompt takes beyond the mean of four later ones."""
    first = total = 0
    for _ in stream:
        last = stats.last or SpecStats()
        total = last.draft_ns
        if last.num_rounds == 1:  # a round is booked when the next one begins
            first = total
        elif last.num_rounds == 5:
            break
    return (first - (total - first) / 4) / 1e9


def measure_fresh(
    open_pair: Callable[[], AbstractContextManager[tuple[Llama, Llama]]],
    names: Sequence[str],
    temps: Sequence[float],
    max_tokens: int,
    repeats: int,
    *,
    go_on: bool = False,
    done: Callable[[str], None] = lambda text: None,
) -> tuple[Figures, ...]:
    """Time the first generations of new objects: figures of the first, of the second, ...

    Every turn opens a pair of its own, stock and with MTP, and lets both generate the same text
    again and again, from an empty context; which of the two goes first alternates. ``done`` is
    called after each run.
    """
    sides: tuple[Variant, ...] = ("plain", "adaptive")
    found: list[list[Series]] = [[] for _ in range(GENERATIONS)]
    for name in names:
        for temp in temps:
            keys = [(i, side) for i in range(GENERATIONS) for side in sides]
            runs: dict[tuple[int, Variant], list[Run]] = {key: [] for key in keys}
            counters: dict[tuple[int, Variant], list[SpecStats]] = {key: [] for key in keys}
            for turn in range(repeats):
                with open_pair() as (plain, mtp):
                    prompt = chat_tokens(plain, PROMPTS[name])
                    for i in range(GENERATIONS):
                        for side in sides if (turn + i) % 2 == 0 else sides[::-1]:
                            llm = plain if side == "plain" else mtp
                            seed = 1 + turn
                            run = generate(
                                llm, prompt, max_tokens, temp=temp, seed=seed, go_on=go_on
                            )
                            runs[i, side].append(run)
                            counters[i, side].append(llm.spec_stats.last or SpecStats())
                            done(f"{name}, temperature {temp:g}, generation {i + 1}")
            for i, side in keys:
                series = Series(name, temp, side, tuple(runs[i, side]), tuple(counters[i, side]))
                found[i].append(series)
    return tuple(map(Figures, found))


def spread(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest."""
    values = list(values)
    return min(values), max(values)


def parse_chances(text: str) -> tuple[float, ...]:
    """Probabilities of a list such as ``0.8,0.5``; LlamaMtpError where it says something else."""
    try:
        chances = tuple(float(word) for word in text.split(","))
    except ValueError:
        chances = (-1.0,)
    if not all(0.0 <= chance <= 1.0 for chance in chances):
        raise LlamaMtpError(f"--synthetic has {text!r}; list probabilities, as in 0.8,0.6,0.4.")
    return chances
