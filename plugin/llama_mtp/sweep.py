"""Every depth against plain decoding on one file: the measurements of ``llama-mtp bench``.

All variants run in turn on the same prompt, again and again (A B C, B C A, ...), so that a noisy
machine disturbs all alike. What compares them is the ratio to the plain run of the same turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any, Literal

from .bench import PROMPTS, Run, chat_tokens, generate
from .errors import LlamaMtpError
from .stats import SpecStats

if TYPE_CHECKING:
    from .llama import Llama

Variant = int | Literal["plain", "adaptive"]  # a number is a constant depth

DEPTHS: tuple[Variant, ...] = (1, 2, 3, 4, "adaptive")
PROMPT_TOKENS = 512  # of the text that prompt processing is timed on, where the context has room
PHASES = ("target_ns", "draft_ns", "sample_ns", "native_overhead_ns", "python_ns")


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
    stats: SpecStats  # of all runs together; empty for plain

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
    """Seconds from an empty context to the second token after one long prompt, by turn.

    The first token alone would hide what MTP does to a prompt: the draft context reads it in the
    first round.
    """

    n_tokens: int
    plain: tuple[float, ...]
    mtp: tuple[float, ...]

    @property
    def plain_rate(self) -> float:
        """Prompt tokens per second."""
        return self.n_tokens / median(self.plain)

    @property
    def mtp_rate(self) -> float:
        return self.n_tokens / median(self.mtp)

    @property
    def ratio(self) -> float:
        """Median over the turns of the time with MTP to the time without; above 1 MTP is slower."""
        return median(m / p for m, p in zip(self.mtp, self.plain, strict=True))


@dataclass(frozen=True)
class Sweep:
    """All that was measured.

    Attributes:
        series: class by class, temperature by temperature, plain first.
        prompt: prompt processing.
        memory: bytes of the object with MTP by context, part and device.
        added_memory: bytes of its buffers less those of stock.
        synthetic: chances that a coin accepted the draft at each position, in place of the model.
            All text is then nonsense, and no speed here is one of the model.
        about: file, versions, threads.
    """

    series: list[Series]
    prompt: Prompt
    memory: Mapping[str, int]
    added_memory: int
    synthetic: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

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

    def ratio(self, name: str, temp: float, variant: Variant) -> float:
        """Median speed-up of a variant on one class."""
        plain = self.get(name, temp, "plain")
        return median(self.get(name, temp, variant).ratios(plain))

    def mean_ratio(self, temp: float, variant: Variant) -> float:
        """Geometric mean of the classes' speed-ups."""
        return geometric_mean(self.ratio(name, temp, variant) for name in self.names)

    def stats(self, variant: Variant, temp: float | None = None) -> SpecStats:
        """Counters of a variant over all classes, at one temperature or all."""
        total = SpecStats()
        for series in self.series:
            if series.variant == variant and temp in (None, series.temp):
                total.add(series.stats)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokens, in types that JSON knows; times in seconds or ns."""
        rows = []
        for series in self.series:
            plain = self.get(series.name, series.temp, "plain")
            rows.append(
                {
                    "class": series.name,
                    "temperature": series.temp,
                    "depth": series.variant,
                    "tokens": series.tokens,
                    "tokens_per_second": series.rates,
                    "median_tokens_per_second": series.rate,
                    "ratios": series.ratios(plain),
                    "ratio": median(series.ratios(plain)),
                    "same_tokens": series.same_tokens(plain),
                    **series.stats.as_dict(),
                }
            )
        return {
            **self.about,
            "meaningless": bool(self.synthetic),
            "synthetic": list(self.synthetic),
            "series": rows,
            "prompt": {
                "tokens": self.prompt.n_tokens,
                "seconds_to_second_token_plain": list(self.prompt.plain),
                "seconds_to_second_token_mtp": list(self.prompt.mtp),
                "ratio": self.prompt.ratio,
            },
            "memory": dict(self.memory),
            "added_memory": self.added_memory,
        }


def phases(stats: SpecStats) -> dict[str, float]:
    """Microseconds of each part of a round, by what it is; empty before the first round."""
    if not stats.num_rounds:
        return {}
    names = ("target decode", "draft decodes", "sampling", "native rest", "Python rest")
    return {
        name: getattr(stats, counter) / stats.num_rounds / 1000
        for name, counter in zip(names, PHASES, strict=True)
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
        most = session.depth_bound if session is not None else 0
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
                stats = {variant: SpecStats() for variant in self.variants}
                for turn in range(self.repeats):
                    first = turn % len(self.variants)
                    for variant in self.variants[first:] + self.variants[:first]:
                        run, last = self._run(variant, prompt, self.max_tokens, temp, 1 + turn)
                        runs[variant].append(run)
                        stats[variant].add(last)
                        done(f"{name}, temperature {temp:g}, depth {variant}")
                found += [
                    Series(name, temp, variant, tuple(runs[variant]), stats[variant])
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
        """Time one long text in turn, plain and with MTP at depth 1; the first turn is not kept."""
        text = "\n".join(PROMPTS.values()) * 8
        most = min(PROMPT_TOKENS, self.plain.n_ctx() - 8)
        prompt = self.plain.tokenize(text.encode())[:most]
        session = self.mtp._session
        depth = min(1, session.depth_bound) if session is not None else 0
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(self.repeats + 1):
            for with_mtp in (False, True) if turn % 2 else (True, False):
                llm = self.mtp if with_mtp else self.plain
                with llm.spec_constant_depth(depth) if with_mtp else nullcontext():
                    start = time.perf_counter()
                    generate(llm, prompt, 2, go_on=True)
                    if turn:
                        times[with_mtp].append(time.perf_counter() - start)
        return Prompt(len(prompt), tuple(times[False]), tuple(times[True]))


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
