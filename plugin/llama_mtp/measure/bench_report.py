"""What ``llama-mtp bench`` prints, writes and draws."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .._version import __version__
from ..errors import LlamaMtpError
from .bench import (
    GENERATIONS,
    Course,
    Fresh,
    Limit,
    Prompt,
    Series,
    Sweep,
    Variant,
    measure_fresh,
    phases,
    spread,
)
from .bound import Interval, median_interval
from .pairs import open_pair, quiet_host

if TYPE_CHECKING:
    from ..engine.stats import SpecStats
    from ..llama import Llama

_SHORT = "MEANINGLESS, drafts accepted by a coin"
_WIDTH = 110  # characters of the widest table
MEANINGLESS = "MEANINGLESS AS SPEED OF THIS MODEL: a coin accepted the drafts, the text is nonsense"


def run_bench(
    console: Console,
    path: Path,
    *,
    names: Sequence[str],
    temps: Sequence[float],
    depths: Sequence[Variant],
    max_tokens: int,
    repeats: int,
    bound: int,
    json_file: Path | None = None,
    plot: Path | None = None,
    synthetic: Sequence[float] = (),
    **options: Any,
) -> Sweep:
    """Measure the GGUF at `path` and print it; `options` goes to ``Llama`` on both sides.

    Raises LlamaMtpError where a file could not be written in the end, before anything is measured.
    """
    _require_folders(json_file, plot)
    if plot is not None:
        require_matplotlib(plot)
    constant = [depth for depth in depths if depth != "adaptive"]
    n_max = max([bound if "adaptive" in depths else 0, *map(int, constant)])
    about = _about(path, max_tokens, repeats, bound, options)
    with open_pair(path, verbose=False, spec_draft_n_max=n_max, **options) as (plain, mtp, added):
        mtp.spec_depth = min(bound, mtp.spec_depth)
        course = Course(
            plain, mtp, names, temps, depths, max_tokens, repeats, go_on=bool(synthetic)
        )
        assert mtp._session is not None
        if synthetic:
            mtp._session.accept_by_coin(synthetic)
            console.print(f"[bold red]{MEANINGLESS}[/]", highlight=False)
        left_out = [str(d) for d in depths if d not in course.variants]
        if left_out:
            console.print(f"left out, deeper than this file drafts: {', '.join(left_out)}")
        found: list[Series] = []
        with quiet_host(), _bar(console) as bar:
            task = bar.add_task("warming up", total=course.n_runs)
            prompt = course.time_prompt()

            def done(text: str) -> None:
                bar.update(task, advance=1, description=text)

            for series in course.measure(done):
                found += series
        sweep = Sweep(
            found,
            prompt,
            mtp.spec_memory(by_device=True),
            added,
            bound,
            tuple(synthetic),
            about,
        )
        explained = mtp._session.policy.explain() if "adaptive" in course.variants else ""
    show_sweep(console, sweep)
    if explained:
        console.print(f"\nadaptive, in the end: {explained}", highlight=False)
    _write(json_file, sweep)
    if plot is not None:
        draw(sweep, plot)
    return sweep


def run_fresh(
    console: Console,
    path: Path,
    *,
    names: Sequence[str],
    temps: Sequence[float],
    max_tokens: int,
    repeats: int,
    bound: int,
    json_file: Path | None = None,
    synthetic: Sequence[float] = (),
    **options: Any,
) -> Fresh:
    """Measure the first generations of new objects and print them; as :func:`run_bench`."""
    _require_folders(json_file)

    @contextmanager
    def pair() -> Iterator[tuple[Llama, Llama]]:
        with open_pair(path, verbose=False, spec_draft_n_max=bound, **options) as (plain, mtp, _):
            if synthetic and mtp._session is not None:
                mtp._session.accept_by_coin(synthetic)
            yield plain, mtp

    total = len(names) * len(temps) * repeats * GENERATIONS * 2
    with quiet_host(), _bar(console) as bar:
        task = bar.add_task("loading", total=total)
        generations = measure_fresh(
            pair,
            names,
            temps,
            max_tokens,
            repeats,
            go_on=bool(synthetic),
            done=lambda text: bar.update(task, advance=1, description=text),
        )
    about = _about(path, max_tokens, repeats, bound, options)
    fresh = Fresh(generations, tuple(synthetic), about)
    show_fresh(console, fresh)
    _write(json_file, fresh)
    return fresh


def _about(
    path: Path, max_tokens: int, repeats: int, bound: int, options: dict[str, Any]
) -> dict[str, Any]:
    from ..host import version

    return {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "llama_mtp": __version__,
        "host": version(),
        "machine": f"{_processor()}, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
        "max_tokens": max_tokens,
        "repeats": repeats,
        "adaptive_bound": bound,
        "options": options,
    }


def _require_folders(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise LlamaMtpError(
                f"There is no folder {file.parent} to write {file.name} to; make it."
            )


def _write(file: Path | None, found: Sweep | Fresh) -> None:
    if file is not None:
        file.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")


def require_matplotlib(file: Path) -> None:
    """Raise LlamaMtpError unless `file` can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LlamaMtpError("--plot needs matplotlib: pip install 'llama-mtp[bench]'.")
    if file.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise LlamaMtpError(f"--plot cannot draw {file.name}; name it .png, .svg or .pdf.")


def _processor() -> str:
    """The processor by name, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


# --- tables ---------------------------------------------------------------------------------------


def show_sweep(console: Console, sweep: Sweep) -> None:
    """Print a table per temperature, means, bounds, the phases of a round, prompt and memory."""
    mark = _begin(console, sweep.synthetic)
    for temp in sweep.temps:
        _show_classes(console, sweep, temp, mark)
    _show_means(console, sweep, mark)
    if set(sweep.variants) - {"plain", "adaptive", 0}:
        _show_bounds(console, sweep, mark)
    console.print(_phases(sweep, mark))
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
    table = _table(
        f"new objects: their first generation and their second{mark}",
        "temperature, class",
        (
            "accepted",
            *("first:\nplain", "\nMTP", "\nratio", "\ninterval"),
            *("second:\nplain", "\nMTP", "\nratio", "\ninterval"),
        ),
    )
    for temp in first.temps:
        table.add_row(f"[bold]{temp:g}[/]")
        for name in first.names:
            row = [f"  {name}", _drafts(first.get(name, temp, "adaptive").stats)[0]]
            for figures in fresh.generations:
                ratios = figures.ratios(name, temp, "adaptive")
                row += [_rate(figures.get(name, temp, v).rate) for v in ("plain", "adaptive")]
                row += [f"{median(ratios):.3f}", _interval(median_interval(ratios), digits=3)]
            table.add_row(*row)
        row = ["  geometric mean", ""]
        for figures in fresh.generations:
            interval = _interval(figures.mean_interval(temp, "adaptive"), digits=3)
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
    table = _table(
        f"temperature {temp:g}{mark}",
        "class, depth",
        ("tokens", "accepted", "by position", "length", "tok/s", "min-max", "ratio", "interval"),
    )
    parted = False  # of a coin's text nobody expects anything else
    for name in sweep.names:
        plain = sweep.get(name, temp, "plain")
        for variant in sweep.variants:
            series = sweep.get(name, temp, variant)
            row = [
                f"[bold]{name}[/]" if variant == "plain" else f"  {variant}",
                str(series.tokens),
                *_drafts(series.stats),
                _rate(series.rate),
                "-".join(map(_rate, spread(series.rates))),
            ]
            if variant == "plain":
                table.add_row(*row, "", "")
            else:
                same = bool(sweep.synthetic) or series.same_tokens(plain)
                parted = parted or not same
                ratios = series.ratios(plain)
                ratio = f"{median(ratios):.2f}{' ' if same else '*'}"
                table.add_row(*row, ratio, _interval(median_interval(ratios)))
    notes = [_intervals(sweep.series[0])]
    if parted:
        notes.append(
            "* the text parted from that of plain decoding, which rounding may cause; "
            "llama-mtp doctor tells"
        )
    _show(console, table, *notes)


def _show_means(console: Console, sweep: Sweep, mark: str) -> None:
    table = _table(
        f"all classes, geometric mean of the ratios{mark}",
        "temperature, depth",
        ("accepted", "by position", "length", "ratio", "interval", "worst", "best"),
    )
    for temp in sweep.temps:
        table.add_row(f"[bold]{temp:g}[/]")
        for variant in sweep.variants:
            if variant != "plain":
                low, high = spread(sweep.ratio(name, temp, variant) for name in sweep.names)
                table.add_row(
                    f"  {variant}",
                    *_drafts(sweep.stats(variant, temp)),
                    f"{sweep.mean_ratio(temp, variant):.3f}",
                    _interval(sweep.mean_interval(temp, variant), digits=3),
                    f"{low:.2f}",
                    f"{high:.2f}",
                )
    _show(
        console,
        table,
        "interval: 95 %, from drawing the turns of every class anew; too narrow below six turns",
    )


def _show_bounds(console: Console, sweep: Sweep, mark: str) -> None:
    adaptive = "adaptive" in sweep.variants
    table = _table(
        f"what costs and acceptance allow a fixed depth up to {sweep.deepest}{mark}",
        "temperature, class",
        ("best depth", "bound", *(adaptive * ("adaptive", "of the bound", "interval"))),
    )
    notes = [
        "bound: over stock's own tok/s of the same turns. Depth 0 is stock itself: what a token "
        "at depth 0",
        "costs more with MTP does not lower the bound",
    ]
    for temp in sweep.temps:
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


def _phases(sweep: Sweep, mark: str) -> Table:
    table = _table(f"a round, in µs, and in plain tokens of the same turn{mark}", "depth", ())
    costs = sweep.round_costs()
    shown = {v: phases(sweep.stats(v)) for v in sweep.variants if v != "plain"}
    for name in next((p for p in shown.values() if p), {}):
        table.add_column(name, justify="right")
    table.add_column("plain tokens", justify="right")
    for variant, parts in shown.items():
        found = costs.get(variant) if isinstance(variant, int) else None
        cost = f"{found['whole']:.2f}" if found else ""
        table.add_row(str(variant), *(f"{us:,.1f}" for us in parts.values()), cost)
    return table


def _drafts(stats: SpecStats) -> tuple[str, str, str]:
    """Accepted of drafted, acceptance per position, tokens a round; blank where nothing ran."""
    if not stats.num_rounds:
        return "", "", ""
    per_position = " ".join(
        f"{rate:.2f}".lstrip("0") if tested else "-"
        for rate, tested in zip(stats.acceptance_per_pos, stats.num_tested_per_pos, strict=True)
    )
    return (
        f"{stats.num_accepted_tokens}/{stats.num_draft_tokens}",
        per_position,
        f"{stats.mean_acceptance_length:.2f}",
    )


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def _show(console: Console, table: Table, *notes: str) -> None:
    console.print(table)
    for note in notes:
        console.print(f"[italic]{note}[/]", highlight=False)
    console.print()


def _table(title: str, left: str, right: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0),
    )
    table.add_column(left, no_wrap=True, min_width=len(left))
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


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


# --- picture --------------------------------------------------------------------------------------


def draw(sweep: Sweep, file: Path) -> None:
    """Draw speed-up per class and depth, and acceptance per position, a row per temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    variants = [variant for variant in sweep.variants if variant != "plain"]
    constant = [variant for variant in variants if variant != "adaptive"]
    deepest: Variant = max(constant, key=int) if constant else "adaptive"
    rows = len(sweep.temps)
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(15, 4.6 * rows + 1), squeeze=False, width_ratios=(2, 1), layout="tight"
    )
    colours = pyplot.get_cmap("viridis")
    for (speed, acceptance), temp in zip(axes, sweep.temps, strict=True):
        width = 0.84 / len(variants)
        for i, variant in enumerate(variants):
            at = [x - 0.42 + (i + 0.5) * width for x in range(len(sweep.names))]
            heights, below, above = [], [], []
            for name in sweep.names:
                ratios = sweep.get(name, temp, variant).ratios(sweep.get(name, temp, "plain"))
                heights.append(median(ratios))
                below.append(median(ratios) - min(ratios))
                above.append(max(ratios) - median(ratios))
            adaptive = variant == "adaptive"
            speed.bar(
                at,
                heights,
                width * 0.92,
                yerr=(below, above),
                error_kw={"elinewidth": 0.8, "ecolor": "0.35"},
                color="tab:red" if adaptive else colours(0.15 + 0.7 * i / len(variants)),
                label="adaptive" if adaptive else f"depth {variant}",
            )
        if constant:
            ratios = [limit.bound.ratio for limit in sweep.limits(temp)]
            places = range(len(sweep.names))
            ends = [x - 0.45 for x in places], [x + 0.45 for x in places]
            speed.hlines(ratios, *ends, color="darkorange", linewidth=2.5, label="bound", zorder=3)
        speed.axhline(1.0, color="black", linewidth=1)
        speed.set_xticks(range(len(sweep.names)), sweep.names, rotation=25, ha="right")
        speed.set_ylabel("speed over plain decoding")
        speed.set_title(f"speed-up, temperature {temp:g} (bars: median, lines: min to max)")
        speed.margins(x=0.01)
        speed.set_ylim(0, max(1.0, speed.get_ylim()[1]) * 1.15)  # room for the legend
        speed.legend(ncols=len(variants) + 1, fontsize=9, loc="upper center", frameon=False)
        markers = "os^vD<>Xp"
        for i, name in enumerate(sweep.names):
            stats = sweep.get(name, temp, deepest).stats
            tested = sum(n > 0 for n in stats.num_tested_per_pos)  # of later ones nothing is known
            rates = stats.acceptance_per_pos[:tested]
            positions = range(1, len(rates) + 1)
            marker = markers[i % len(markers)]
            acceptance.plot(positions, rates, marker=marker, linewidth=1.2, label=name)
            acceptance.set_xticks(range(1, 1 + len(stats.num_tested_per_pos)))
        acceptance.set_ylim(0, 1.02)
        acceptance.set_xlabel("draft position")
        acceptance.set_ylabel("accepted, given those before")
        acceptance.set_title(f"acceptance in rounds of depth {deepest}, temperature {temp:g}")
        acceptance.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    title = str(sweep.about.get("file", ""))
    if sweep.synthetic:
        title = f"{title}\n{MEANINGLESS}"
    figure.suptitle(title, color="red" if sweep.synthetic else "black")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
