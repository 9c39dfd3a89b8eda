"""What ``instrument.py`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from bounds import Limit, round_costs
from intervals import Interval, mean_interval, median_interval
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama_mtp.engine.stats import SpecStats
from llama_mtp.measure.bench import Figures, Series, Variant
from llama_mtp.measure.bench_report import acceptance, new_table, rate

if TYPE_CHECKING:
    from instrument import Fresh, Prompt, Sweep

MEANINGLESS = "MEANINGLESS AS SPEED OF THIS MODEL: a coin accepted the drafts, the text is nonsense"
_SHORT = "MEANINGLESS, drafts accepted by a coin"
_WIDTH = 110  # characters of the widest table
_PHASES = {
    "target decode": "target_ns",
    "draft decodes": "draft_ns",
    "sampling": "sample_ns",
    "rollback": "rollback_ns",
    "native rest": "native_overhead_ns",
    "Python rest": "python_ns",
}


def show_sweep(console: Console, sweep: Sweep) -> None:
    """Print a table per temperature, means, bounds, the phases of a round, prompt and memory."""
    mark = _begin(console, sweep.synthetic)
    figures = sweep.figures
    for temp in figures.temps:
        _show_classes(console, sweep, temp, mark)
    _show_means(console, figures, mark)
    if set(figures.variants) - {"adaptive", 0}:
        _show_bounds(console, sweep, mark)
    _show(console, _phases(figures, mark))
    _show_prompt(console, sweep.prompt, mark)
    parts = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in sweep.memory.items() if size)
    console.print(
        f"memory: {sweep.added_memory / 2**20:+.1f} MiB of buffers against stock; held, in MiB: "
        f"{escape(parts)}{mark}",
        highlight=False,
    )


def show_fresh(console: Console, fresh: Fresh) -> None:
    """Print the first and the second generation of new objects side by side."""
    mark = _begin(console, fresh.synthetic)
    first = fresh.generations[0]
    table = new_table(
        f"new objects: their first generation and their second{mark}",
        "temperature, class",
        "accepted",
        *("first:\nplain", "\nMTP", "\nratio", "\ninterval"),
        *("second:\nplain", "\nMTP", "\nratio", "\ninterval"),
    )
    for temp in first.temps:
        table.add_row(f"[bold]{temp:g}[/]")
        for name in first.names:
            row = [f"  {name}", _drafts(first.get(name, temp, "adaptive").stats)[0]]
            for figures in fresh.generations:
                ratios = figures.ratios(name, temp, "adaptive")
                row += [rate(figures.get(name, temp, v).rate) for v in ("plain", "adaptive")]
                row += [f"{median(ratios):.3f}", _interval(median_interval(ratios), digits=3)]
            table.add_row(*row)
        row = ["  geometric mean", ""]
        for figures in fresh.generations:
            interval = _interval(_mean(figures, temp, "adaptive"), digits=3)
            row += ["", "", f"{figures.mean_ratio(temp, 'adaptive'):.3f}", interval]
        table.add_row(*row, style="bold")
    _show(
        console,
        table,
        "tok/s after the first token; ratio: against the same generation of a stock object as new",
        f"accepted: in the first; {_intervals(first.series[0])}",
    )


def _begin(console: Console, synthetic: Sequence[float]) -> str:
    """Make room, and return the mark of every table of a run that a coin decided."""
    if not console.is_terminal and console.width < _WIDTH:
        console.width = _WIDTH  # a file or a pipe: nothing has to be cut off
    if not synthetic:
        return ""
    chances = ", ".join(f"{chance:g}" for chance in synthetic)
    console.print(f"[bold red]{MEANINGLESS} (chances {chances})[/]", highlight=False)
    return f" [bold red]{_SHORT}[/]"


def _show_classes(console: Console, sweep: Sweep, temp: float, mark: str) -> None:
    table = new_table(
        f"temperature {temp:g}{mark}",
        "class, depth",
        "tokens",
        *("accepted", "by position", "length"),
        *("tok/s", "min-max", "ratio", "interval"),
    )
    figures, parted = sweep.figures, False
    for name in figures.names:
        for variant in ("plain", *figures.variants):
            series = figures.get(name, temp, variant)
            row = [
                f"[bold]{name}[/]" if variant == "plain" else f"  {variant}",
                str(sum(len(run.tokens) for run in series.runs)),
                *_drafts(series.stats),
                rate(series.rate),
                f"{rate(min(series.rates))}-{rate(max(series.rates))}",
            ]
            if variant != "plain":
                # of a coin's text nobody expects the same
                other = not sweep.synthetic and figures.parted(name, temp, variant)
                parted = parted or other
                ratios = figures.ratios(name, temp, variant)
                row += [f"{median(ratios):.2f}{'*' * other}"]
                row += [_interval(median_interval(ratios))]
            table.add_row(*row)
    notes = [_intervals(figures.series[0])]
    if parted:
        notes.append(
            "* the text parted from that of plain decoding, which rounding may cause; "
            "llama-mtp doctor tells"
        )
    _show(console, table, *notes)


def _show_means(console: Console, figures: Figures, mark: str) -> None:
    table = new_table(
        f"all classes, geometric mean of the ratios{mark}",
        "temperature, depth",
        *("accepted", "by position", "length", "ratio", "interval", "worst", "best"),
    )
    for temp in figures.temps:
        table.add_row(f"[bold]{temp:g}[/]")
        for variant in figures.variants:
            ratios = [figures.ratio(name, temp, variant) for name in figures.names]
            table.add_row(
                f"  {variant}",
                *_drafts(figures.stats(variant, temp)),
                f"{figures.mean_ratio(temp, variant):.3f}",
                _interval(_mean(figures, temp, variant), digits=3),
                f"{min(ratios):.2f}",
                f"{max(ratios):.2f}",
            )
    _show(
        console,
        table,
        "interval: 95 %, from drawing the turns of every class anew; too narrow below six turns",
    )


def _show_bounds(console: Console, sweep: Sweep, mark: str) -> None:
    adaptive = "adaptive" in sweep.figures.variants
    table = new_table(
        f"what costs and acceptance allow a fixed depth up to {sweep.deepest}{mark}",
        "temperature, class",
        *("best depth", "bound", *(adaptive * ("adaptive", "of the bound", "interval"))),
    )
    notes = [
        "bound: over stock's own tok/s of the same turns. Depth 0 is stock itself: what a token "
        "at depth 0",
        "costs more with MTP does not lower the bound",
    ]
    for temp in sweep.figures.temps:
        table.add_row(f"[bold]{temp:g}[/]")
        for limit in sweep.limits(temp):
            row = [f"  {limit.name}", str(limit.bound.depth), f"{limit.bound.ratio:.3f}"]
            table.add_row(*row, *_of_bound(limit))
        limit = sweep.mean_limit(temp)
        row = ["  geometric mean", "", f"{limit.bound.ratio:.3f}"]
        table.add_row(*row, *_of_bound(limit), style="bold")
        note = f"temperature {temp:g}: {limit.free:.3f} if native and Python rest took no time"
        if limit.adaptive is not None:
            note += f", and adaptive {limit.adaptive / limit.free:.3f} of that"
        notes.append(note)
    _show(console, table, *notes)


def _of_bound(limit: Limit) -> tuple[str, ...]:
    if limit.adaptive is None or limit.interval is None:
        return ()
    share = limit.adaptive / limit.bound.ratio
    return f"{limit.adaptive:.3f}", f"{share:.3f}", _interval(limit.interval, digits=3)


def _interval(interval: Interval, digits: int = 2) -> str:
    return f"{interval.low:.{digits}f}-{interval.high:.{digits}f}" if interval.coverage else ""


def _intervals(series: Series) -> str:
    """What an interval of the median is worth, for as many turns as there were."""
    coverage, turns = median_interval(series.rates).coverage, len(series.runs)
    if coverage >= 0.95:
        return f"interval: {coverage:.0%} of the median of {turns} turns"
    what = f"{coverage:.0%} of the median of {turns} turns" if turns > 1 else "none of one turn"
    return f"interval: {what}; --repeats 6 or more give 95 %"


def _phases(figures: Figures, mark: str) -> Table:
    table = new_table(f"a round, in µs, and in plain tokens of the same turn{mark}", "depth")
    costs = round_costs(figures)
    for name in _PHASES:
        table.add_column(name, justify="right")
    table.add_column("plain tokens", justify="right")
    for variant in figures.variants:
        found = costs.get(variant) if isinstance(variant, int) else None
        cost = f"{found['whole']:.2f}" if found else ""
        times = [f"{us:,.1f}" for us in phases(figures.stats(variant)).values()]
        table.add_row(str(variant), *times, cost)
    return table


def phases(stats: SpecStats) -> dict[str, float]:
    """Microseconds of each part of a round, by what it is; empty before the first round."""
    if not stats.num_rounds:
        return {}
    return {
        name: getattr(stats, counter) / stats.num_rounds / 1000 for name, counter in _PHASES.items()
    }


def _mean(figures: Figures, temp: float, variant: Variant) -> Interval:
    return mean_interval([figures.ratios(name, temp, variant) for name in figures.names])


def _drafts(stats: SpecStats) -> tuple[str, str, str]:
    """Accepted of drafted, acceptance per position, tokens a round; blank where nothing ran."""
    _, per_position, length = acceptance(stats)
    counts = f"{stats.num_accepted_tokens}/{stats.num_draft_tokens}" if stats.num_rounds else ""
    return counts, per_position, length


def _show(console: Console, table: Table, *notes: str) -> None:
    console.print(table)
    for note in notes:
        console.print(f"[italic]{note}[/]", highlight=False)
    console.print()


def _show_prompt(console: Console, prompt: Prompt, mark: str) -> None:
    interval = _interval(median_interval(prompt.ratios), digits=3)
    console.print(
        f"prompt of {prompt.n_tokens} tokens, to the first token: {prompt.plain_rate:.0f} tok/s "
        f"plain, {prompt.mtp_rate:.0f} with MTP;\ntakes {median(prompt.ratios):.3f} times as long"
        f"{f' ({interval})' * bool(interval)}{mark}",
        highlight=False,
    )
    share = median(prompt.catch_up_shares)
    console.print(
        f"then the draft reads the prompt, before it drafts for the first time: "
        f"{median(prompt.catch_up) * 1000:.1f} ms,\n{share:.1%} of the prompt's time{mark}",
        highlight=False,
    )
