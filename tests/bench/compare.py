"""Ratios of what the sides took, their intervals, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table
from sides import OURS, SIDES, Run

Cell = tuple[str, float]  # prompt class, temperature
Results = dict[Cell, dict[str, list[Run]]]  # cell: side: its runs, one per repeat


@dataclass(frozen=True)
class Spread:
    """A middle value, and how far it may be off."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Median and extremes."""
        return cls(median(values), min(values), max(values)) if values else None

    def text(self, digits: int) -> str:
        """The value and its range; the value alone where one run is all there is."""
        if self.low == self.high:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}..{self.high:.{digits}f}]"


def ratios(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    """Per repeat, our rate over the peer's; empty if a text is too short to have a rate."""
    pairs = list(zip(ours, peer, strict=True))
    return [o.rate / p.rate for o, p in pairs] if all(o.rate and p.rate for o, p in pairs) else []


def per_token(
    ours: Sequence[Run], peer: Sequence[Run], seconds: Callable[[Run], float]
) -> list[float]:
    """Per repeat, the peer's seconds per token over ours; empty if a run has none of either."""
    pairs = list(zip(ours, peer, strict=True))
    if not all(seconds(r) and r.n_tokens for pair in pairs for r in pair):
        return []
    return [seconds(p) / p.n_tokens / (seconds(o) / o.n_tokens) for o, p in pairs]


def cpu_ratios(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    """Per repeat, the peer's computing per token over ours; empty if it is not known."""
    return per_token(ours, peer, lambda run: run.cpu_seconds)


def request_ratios(ours: Sequence[Run], peer: Sequence[Run]) -> list[float]:
    """Per repeat, the peer's time per token over ours, prompt included; empty without a text."""
    return per_token(ours, peer, lambda run: run.seconds)


def geometric_mean(cells: Sequence[Sequence[float]], draws: int = 2000) -> Spread | None:
    """Of the medians over the repeats of each cell, with a 95 % confidence interval.

    The interval is a seeded bootstrap that draws the repeats of each cell anew. Cells have as many
    repeats as each other, or none and are left out; None if all are.
    """
    logs = np.log(np.asarray([cell for cell in cells if cell], dtype=float))
    if not logs.size:
        return None
    n_cells, repeats = logs.shape
    picks = np.random.default_rng(0).integers(repeats, size=(draws, n_cells, repeats))
    drawn = np.median(np.take_along_axis(logs[None], picks, axis=2), axis=2).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    middle = np.median(logs, axis=1).mean()
    return Spread(float(np.exp(middle)), float(np.exp(low)), float(np.exp(high)))


def over_cells(
    results: Results, of: Callable[[Mapping[str, list[Run]]], list[float]], temp: float | None
) -> Spread | None:
    """The geometric mean over the cells, of one temperature or all, of what `of` makes of each."""
    return geometric_mean([of(runs) for (_, t), runs in results.items() if temp in (None, t)])


def speeds(results: Results, ours: str, peer: str, temp: float | None = None) -> Spread | None:
    """Our rate over the peer's. None if no cell has rates of both."""
    return over_cells(results, lambda runs: ratios(runs[ours], runs[peer]), temp)


def gains(results: Results, ours: str, peer: str) -> Spread | None:
    """Our speed-up over our plain decoding, over the peer's over its own: the build left out.

    None if a plain side is missing, or if both are plain.
    """
    base, other = SIDES[ours].plain, SIDES[peer].plain
    if (base, other) == (ours, peer):
        return None

    def of(runs: Mapping[str, list[Run]]) -> list[float]:
        if base not in runs or other not in runs:
            return []
        sides = ratios(runs[ours], runs[base]), ratios(runs[peer], runs[other])
        return [a / b for a, b in zip(*sides, strict=True)] if all(sides) else []

    return over_cells(results, of, None)


def computing(results: Results, ours: str, peer: str) -> Spread | None:
    """The peer's computing per token over ours: a check on :func:`speeds` on a busy machine."""
    return over_cells(results, lambda runs: cpu_ratios(runs[ours], runs[peer]), None)


def requests(results: Results, ours: str, peer: str) -> Spread | None:
    """The peer's time per token over ours, wherever the head reads the prompt."""
    return over_cells(results, lambda runs: request_ratios(runs[ours], runs[peer]), None)


def class_table(
    results: Results, name: str, temps: Sequence[float], prompt: Sequence[int]
) -> Table:
    """One prompt class: a row per temperature and side."""
    table = Table("T", "side", title=f"{name}, {len(prompt)} prompt tokens")
    headings = "tokens", "accepted", "tok/s", "prompt s", "x plain", *(f"{o} / it" for o in OURS)
    for heading in headings:
        table.add_column(heading, justify="right")
    for temp in temps:
        runs = results[name, temp]
        for side, those in runs.items():
            drafted, accepted = sum(r.drafted for r in those), sum(r.accepted for r in those)
            plain = SIDES[side].plain
            columns = [
                Spread.of([r.rate for r in those]),
                Spread.of(ratios(those, runs[plain])) if plain in runs and plain != side else None,
                *(
                    Spread.of(ratios(runs[o], those)) if o in runs and o != side else None
                    for o in OURS
                ),
            ]
            rate, *against = [c.text(1 if c is columns[0] else 2) if c else "-" for c in columns]
            table.add_row(
                f"{temp:g}",
                side,
                f"{median(r.n_tokens for r in those):g}",
                f"{accepted} of {drafted}" if drafted else "-",
                rate,
                f"{median(r.prompt_seconds for r in those):.3f}",
                *against,
            )
    return table


def summary_table(results: Results, names: Sequence[str], temps: Sequence[float]) -> Table:
    """Geometric means over the classes: our rate over each peer's, and what checks it."""
    title = "ours over the peer: geometric mean over the classes and 95 % interval"
    table = Table("ours", "peer", title=title)
    checks = "of speed-ups", "of requests", "of computing"
    for heading in (*(f"T {temp:g}" for temp in temps), "all", *checks):
        table.add_column(heading, justify="right")
    for ours, peer in pairs_of(names):
        columns = [speeds(results, ours, peer, t) for t in (*temps, None)]
        columns += [of(results, ours, peer) for of in (gains, requests, computing)]
        table.add_row(ours, peer, *(c.text(3) if c else "-" for c in columns))
    return table


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each of ours that is there with every other side; and stock with the peers' plain sides."""
    pairs = [(ours, peer) for ours in OURS if ours in names for peer in names if peer != ours]
    plain = [name for name in names if name != "stock" and SIDES[name].plain == name]
    return pairs + [("stock", name) for name in plain if "stock" in names]


def as_json(
    results: Results, names: Sequence[str], temps: Sequence[float], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, and the ratios."""
    means: dict[str, dict[str, Any]] = {}
    for ours, peer in pairs_of(names):
        found = {f"T {t:g}": speeds(results, ours, peer, t) for t in temps}
        found |= {"all": speeds(results, ours, peer), "speed-ups": gains(results, ours, peer)}
        found |= {of.__name__: of(results, ours, peer) for of in (requests, computing)}
        means[f"{ours} / {peer}"] = {key: asdict(s) for key, s in found.items() if s is not None}
    runs = [
        {"class": name, "temperature": temp, "side": side, "runs": [asdict(r) for r in those]}
        for (name, temp), sides in results.items()
        for side, those in sides.items()
    ]
    return {**about, "geometric_mean_ratios": means, "runs": runs}
