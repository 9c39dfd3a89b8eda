"""Plain decoding, constant depths and the adaptive depth on one file, prompt by prompt.

All variants run in turn on the same prompt, again and again (A B C, B C A, ...), so that a noisy
machine disturbs all alike. What compares them is the ratio to the plain run of the same turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any, Literal

from ..engine.stats import SpecStats
from ..errors import LlamaMtpError
from .pairs import Run, chat_tokens, generate

if TYPE_CHECKING:
    from ..host import StockLlama
    from ..llama import Llama

Variant = int | Literal["plain", "adaptive"]  # a number is a constant depth

DEPTHS: tuple[Variant, ...] = (1, 2, 3, 4, "adaptive")


def parse_depths(text: str) -> tuple[Variant, ...]:
    """Depths of a list such as ``1,2,adaptive``; LlamaMtpError where it says something else."""
    depths: list[Variant] = []
    for word in map(str.strip, text.split(",")):
        if word == "adaptive":
            depths.append("adaptive")
        elif word.isdecimal() and int(word) <= 64:
            depths.append(int(word))
        else:
            raise LlamaMtpError(
                f"--depths has {word!r}; list numbers up to 64 and 'adaptive', as in 1,2,adaptive."
            )
    return tuple(dict.fromkeys(depths))


def variants_of(mtp: Llama, depths: Sequence[Variant]) -> tuple[Variant, ...]:
    """Plain, and those of `depths` that the object can draft."""
    most = mtp._session.setup.depth if mtp._session is not None else 0
    return ("plain", *(depth for depth in depths if depth == "adaptive" or int(depth) <= most))


@dataclass(frozen=True)
class Series:
    """One prompt, temperature and variant: its runs in the order of the turns."""

    name: str
    temp: float
    variant: Variant
    runs: tuple[Run, ...]
    counters: tuple[SpecStats, ...]  # of each run; empty ones for plain

    @property
    def stats(self) -> SpecStats:
        """Counters of all runs together."""
        return _sum(self.counters)

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
class Figures:
    """Series prompt by prompt, temperature by temperature, plain first."""

    series: list[Series]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(series.name for series in self.series))

    @property
    def temps(self) -> list[float]:
        return list(dict.fromkeys(series.temp for series in self.series))

    @property
    def variants(self) -> list[Variant]:
        """All but plain."""
        return [v for v in dict.fromkeys(series.variant for series in self.series) if v != "plain"]

    def get(self, name: str, temp: float, variant: Variant) -> Series:
        """The series of these; KeyError if there is none."""
        for series in self.series:
            if (series.name, series.temp, series.variant) == (name, temp, variant):
                return series
        raise KeyError((name, temp, variant))

    def ratios(self, name: str, temp: float, variant: Variant) -> list[float]:
        """Speed-up of a variant on one prompt by turn."""
        return self.get(name, temp, variant).ratios(self.get(name, temp, "plain"))

    def ratio(self, name: str, temp: float, variant: Variant) -> float:
        """Median speed-up of a variant on one prompt."""
        return median(self.ratios(name, temp, variant))

    def rate(self, temp: float, variant: Variant) -> float:
        """Median over the prompts of a variant's tokens per second."""
        return median(self.get(name, temp, variant).rate for name in self.names)

    def mean_ratio(self, temp: float, variant: Variant) -> float:
        """Geometric mean of the prompts' speed-ups."""
        return geometric_mean(self.ratio(name, temp, variant) for name in self.names)

    def parted(self, name: str, temp: float, variant: Variant) -> bool:
        """Whether a text differs from that of plain decoding, which rounding may cause."""
        return not self.get(name, temp, variant).same_tokens(self.get(name, temp, "plain"))

    def stats(self, variant: Variant, temp: float | None = None) -> SpecStats:
        """Counters of a variant over all prompts, at one temperature or all."""
        same = (s for s in self.series if s.variant == variant and temp in (None, s.temp))
        return _sum([counters for series in same for counters in series.counters])

    def rows(self) -> list[dict[str, Any]]:
        """Every series without its tokens, in types that JSON knows; times in ns."""
        return [
            {
                "class": series.name,
                "temperature": series.temp,
                "depth": series.variant,
                "tokens": sum(len(run.tokens) for run in series.runs),
                "tokens_per_second": series.rates,
                "median_tokens_per_second": series.rate,
                "ratios": (ratios := self.ratios(series.name, series.temp, series.variant)),
                "ratio": median(ratios),
                "same_tokens": not self.parted(series.name, series.temp, series.variant),
                **series.stats.as_dict(),
            }
            for series in self.series
        ]

    def mean_rows(self) -> list[dict[str, Any]]:
        """The means over all prompts, in types that JSON knows."""
        return [
            {"temperature": temp, "depth": variant, "ratio": self.mean_ratio(temp, variant)}
            for temp in self.temps
            for variant in self.variants
        ]


def measure(
    plain: StockLlama,
    mtp: Llama,
    prompts: Mapping[str, str],
    variants: Sequence[Variant],
    *,
    temps: Sequence[float] = (0.0,),
    max_tokens: int,
    repeats: int,
    go_on: bool = False,
    done: Callable[[str], None] = lambda text: None,
) -> Figures:
    """Run every variant on every prompt, in turns; the runs of one turn have one seed.

    A short untimed run of every variant comes first.

    Args:
        plain, mtp: the two objects of a pair.
        prompts: texts of a user's message by name.
        variants: what to compare, plain first.
        temps: temperatures.
        max_tokens: most tokens of a run.
        repeats: turns per prompt and temperature.
        go_on: past the end of the text.
        done: called after each run, with what it was.
    """

    def run(
        variant: Variant, prompt: list[int], n: int, temp: float, seed: int
    ) -> tuple[Run, SpecStats]:
        llm = plain if variant == "plain" else mtp
        constant = variant not in ("plain", "adaptive")
        with mtp.spec_constant_depth(int(variant)) if constant else nullcontext():
            timed = generate(llm, prompt, n, temp=temp, seed=seed, go_on=go_on)
        return timed, (mtp.spec_stats.last if variant != "plain" else None) or SpecStats()

    warm_up = chat_tokens(plain, "Count from one to ten.")
    for variant in variants:
        run(variant, warm_up, 16, 0.0, 1)
    found: list[Series] = []
    for name, text in prompts.items():
        prompt = chat_tokens(plain, text)
        for temp in temps:
            taken: dict[Variant, list[tuple[Run, SpecStats]]] = {v: [] for v in variants}
            for turn in range(repeats):
                first = turn % len(variants)
                for variant in (*variants[first:], *variants[:first]):
                    taken[variant].append(run(variant, prompt, max_tokens, temp, 1 + turn))
                    done(f"{name}, temperature {temp:g}, depth {variant}")
            for variant, pairs in taken.items():
                runs, counters = zip(*pairs, strict=True)
                found.append(Series(name, temp, variant, runs, counters))
    return Figures(found)


def _sum(counters: Sequence[SpecStats]) -> SpecStats:
    total = SpecStats()
    for one in counters:
        total.add(one)
    return total
