"""What ``llama-mtp bench`` runs, prints, writes and draws."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .._version import __version__
from ..errors import LlamaMtpError
from .bench import Figures, Variant, measure, variants_of
from .pairs import open_pair, quiet_host

if TYPE_CHECKING:
    from ..engine.stats import SpecStats

PARTED = (
    "* the text parted from that of plain decoding, which rounding may cause;\n"
    "  llama-mtp doctor tells"
)


def run_bench(
    console: Console,
    path: Path,
    *,
    prompts: Mapping[str, str],
    temps: Sequence[float],
    depths: Sequence[Variant],
    max_tokens: int,
    repeats: int,
    bound: int,
    json_file: Path | None = None,
    plot: Path | None = None,
    **options: Any,
) -> Figures:
    """Measure the GGUF at `path` and print it; `options` goes to ``Llama`` on both sides.

    Raises LlamaMtpError where a file could not be written in the end, before anything is measured.
    """
    require_writable(json_file, plot)
    n_max = max([bound, *(int(depth) for depth in depths if depth != "adaptive")])
    facts = about(path, max_tokens, repeats, bound, options)
    with open_pair(path, verbose=False, spec_draft_n_max=n_max, **options) as (plain, mtp, added):
        mtp.spec_depth = min(bound, mtp.spec_depth)
        variants = variants_of(mtp, depths)
        if left_out := [str(depth) for depth in depths if depth not in variants]:
            console.print(f"left out, deeper than this file drafts: {', '.join(left_out)}")
        length: dict[str, Any] = {"temps": temps, "max_tokens": max_tokens, "repeats": repeats}
        n_runs = len(prompts) * len(temps) * len(variants) * repeats
        with quiet_host(), progress(console, n_runs) as done:
            figures = measure(plain, mtp, prompts, variants, done=done, **length)
        assert mtp._session is not None
        explained = mtp._session.policy.explain()
    for table in (*(prompt_table(figures, temp) for temp in temps), mean_table(figures)):
        console.print(table, "")
    if any(figures.parted(series.name, series.temp, series.variant) for series in figures.series):
        console.print(PARTED, highlight=False)
    if "adaptive" in variants:
        console.print(f"adaptive, in the end: {explained}", highlight=False)
    console.print(f"memory: {added / 2**20:+.1f} MiB of buffers against stock", highlight=False)
    if json_file is not None:
        told = {"series": figures.rows(), "means": figures.mean_rows(), "added_memory": added}
        write_json(json_file, {**facts, **told})
    if plot is not None:
        picture(figures, path.name).savefig(plot, dpi=110)
    return figures


def about(
    path: Path, max_tokens: int, repeats: int, bound: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What was measured, when, and with which versions."""
    from ..host import version

    return {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "llama_mtp": __version__,
        "host": version(),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
        "max_tokens": max_tokens,
        "repeats": repeats,
        "adaptive_bound": bound,
        "options": dict(options),
    }


def require_writable(json_file: Path | None, plot: Path | None) -> None:
    """Raise LlamaMtpError unless both files have a folder and the second can be drawn."""
    for file in filter(None, (json_file, plot)):
        if not file.absolute().parent.is_dir():
            raise LlamaMtpError(
                f"There is no folder {file.parent} to write {file.name} to; make it."
            )
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise LlamaMtpError(f"--plot cannot draw {plot.name}; name it .png, .svg or .pdf.")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise LlamaMtpError("--plot needs matplotlib: pip install 'llama-mtp[bench]'.")


def write_json(file: Path, told: Mapping[str, Any]) -> None:
    """Write figures; the file has its name when it is complete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of `total` steps on a terminal; call what it yields after each step."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    how: dict[str, Any] = {
        "console": console,
        "transient": True,
        "disable": not console.is_terminal,
    }
    with Progress(*columns, TimeRemainingColumn(), **how) as bar:
        task = bar.add_task("warming up", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


# --- tables ---------------------------------------------------------------------------------------


def prompt_table(figures: Figures, temp: float) -> Table:
    """A row for each prompt and variant at one temperature; a star where a text parted."""
    table = new_table(f"temperature {temp:g}", "prompt, depth", "tok/s", "ratio", "min-max")
    _add_acceptance(table)
    for name in figures.names:
        table.add_row(f"[bold]{name}[/]", rate(figures.get(name, temp, "plain").rate))
        for variant in figures.variants:
            series, ratios = figures.get(name, temp, variant), figures.ratios(name, temp, variant)
            star = "*" * figures.parted(name, temp, variant)
            cells = rate(series.rate), f"{median(ratios):.2f}{star}", spread(ratios)
            table.add_row(f"  {variant}", *cells, *acceptance(series.stats))
    return table


def mean_table(figures: Figures) -> Table:
    """The means over all prompts, a row for each temperature and variant."""
    table = new_table(
        "all prompts, geometric mean of the ratios", "temperature, depth", "ratio", "worst-best"
    )
    _add_acceptance(table)
    for temp in figures.temps:
        table.add_row(f"[bold]{temp:g}[/]")
        for variant in figures.variants:
            ratios = [figures.ratio(name, temp, variant) for name in figures.names]
            mean = f"{figures.mean_ratio(temp, variant):.2f}"
            stats = figures.stats(variant, temp)
            table.add_row(f"  {variant}", mean, spread(ratios), *acceptance(stats))
    return table


def new_table(title: str, left: str, *right: str) -> Table:
    """An empty table whose columns but the first are numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 0), False
    table.add_column(left, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add_acceptance(table: Table) -> None:
    table.add_column("accepted", justify="right")
    table.add_column("by position", max_width=24)
    table.add_column("tok/round", justify="right")


def acceptance(stats: SpecStats) -> tuple[str, str, str]:
    """Share of accepted drafts, the same by position, tokens a round; blank where nothing ran."""
    if not stats.num_rounds:
        return "", "", ""
    per_position = " ".join(
        f"{share:.2f}".lstrip("0") if tested else "-"
        for share, tested in zip(stats.acceptance_per_pos, stats.num_tested_per_pos, strict=True)
    )
    share = f"{stats.draft_acceptance_rate:.0%}" if stats.num_draft_tokens else ""
    return share, per_position, f"{stats.mean_acceptance_length:.2f}"


def rate(tokens_per_second: float) -> str:
    """Tokens per second, three digits or more."""
    return f"{tokens_per_second:.{1 if tokens_per_second < 100 else 0}f}"


def spread(values: Sequence[float]) -> str:
    """The smallest and the largest."""
    return f"{min(values):.2f}-{max(values):.2f}"


# --- picture --------------------------------------------------------------------------------------


def picture(figures: Figures, title: str) -> Any:
    """Draw speed-up per prompt and depth, and acceptance per position, a row per temperature.

    Returns a matplotlib figure, whose axes are those two in turn.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names, variants, rows = figures.names, figures.variants, len(figures.temps)
    constant = [variant for variant in variants if variant != "adaptive"]
    deepest: Variant = max(constant, key=int) if constant else "adaptive"
    figure = Figure(figsize=(15, 4.6 * rows + 1), layout="tight")
    figure.suptitle(title)
    axes = figure.subplots(rows, 2, squeeze=False, width_ratios=(2, 1))
    for (speed, accepted), temp in zip(axes, figures.temps, strict=True):
        width = 0.84 / len(variants)
        for i, variant in enumerate(variants):
            at = [x - 0.42 + (i + 0.5) * width for x in range(len(names))]
            turns = [figures.ratios(name, temp, variant) for name in names]
            heights = [median(ratios) for ratios in turns]
            below = [median(ratios) - min(ratios) for ratios in turns]
            above = [max(ratios) - median(ratios) for ratios in turns]
            colour: Any = colormaps["viridis"](0.15 + 0.7 * i / len(variants))
            label = f"depth {variant}"
            if variant == "adaptive":
                colour, label = "tab:red", "adaptive"
            speed.bar(at, heights, width * 0.92, yerr=(below, above), color=colour, label=label)
        speed.axhline(1.0, color="black", linewidth=1)
        speed.set_xticks(range(len(names)), names, rotation=25, ha="right")
        speed.set_ylabel("speed over plain decoding")
        speed.set_title(f"speed-up, temperature {temp:g} (bars: median, lines: min to max)")
        speed.set_ylim(0, max(1.0, speed.get_ylim()[1]) * 1.15)  # room for the legend
        speed.legend(ncols=len(variants) + 1, loc="upper center", frameon=False)
        for i, name in enumerate(names):
            stats = figures.get(name, temp, deepest).stats
            tested = sum(n > 0 for n in stats.num_tested_per_pos)  # of later ones nothing is known
            rates = stats.acceptance_per_pos[:tested]
            marker = "os^vD<>Xp"[i % 9]
            accepted.plot(range(1, tested + 1), rates, marker=marker, label=name)
            accepted.set_xticks(range(1, 1 + len(stats.num_tested_per_pos)))
        accepted.set_ylim(0, 1.02)
        accepted.set_xlabel("draft position")
        accepted.set_ylabel("accepted, given those before")
        accepted.set_title(f"acceptance in rounds of depth {deepest}, temperature {temp:g}")
        accepted.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
