"""What ``llama-mtp bench`` prints, writes and draws."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Sequence
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

from ._version import __version__
from .bench import open_pair, quiet_host
from .errors import LlamaMtpError
from .sweep import Course, Prompt, Series, Sweep, Variant, phases, spread

if TYPE_CHECKING:
    from .stats import SpecStats

_SHORT = "MEANINGLESS, drafts accepted by a coin"
_WIDTH = 100  # characters of the widest table
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
    for file in (json_file, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise LlamaMtpError(
                f"There is no folder {file.parent} to write {file.name} to; make it."
            )
    if plot is not None:
        require_matplotlib(plot)
    constant = [depth for depth in depths if depth != "adaptive"]
    n_max = max([bound if "adaptive" in depths else 0, *map(int, constant)])
    about = {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "llama_mtp": __version__,
        "machine": f"{_processor()}, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
        "max_tokens": max_tokens,
        "repeats": repeats,
        "adaptive_bound": bound,
        "options": options,
    }
    with open_pair(path, verbose=False, spec_draft_n_max=n_max, **options) as (plain, mtp, added):
        from .host import version

        about["host"] = version()
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
            tuple(synthetic),
            about,
        )
        explained = mtp._session.policy.explain() if "adaptive" in course.variants else ""
    show_sweep(console, sweep)
    if explained:
        console.print(f"\nadaptive, in the end: {explained}", highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(sweep.to_dict(), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(sweep, plot)
    return sweep


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
    """Print a table per temperature, the means, the phases of a round, prompt and memory."""
    mark = f" [bold red]{_SHORT}[/]" if sweep.synthetic else ""
    if sweep.synthetic:
        chances = ", ".join(f"{chance:g}" for chance in sweep.synthetic)
        console.print(f"[bold red]{MEANINGLESS} (chances {chances})[/]", highlight=False)
    if not console.is_terminal and console.width < _WIDTH:
        console.width = _WIDTH  # a file or a pipe: nothing has to be cut off
    for temp in sweep.temps:
        console.print(_classes(sweep, temp, mark))
    console.print(_means(sweep, mark))
    console.print(_phases(sweep, mark))
    _show_prompt(console, sweep.prompt, mark)
    parts = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in sweep.memory.items() if size)
    console.print(
        f"memory: {sweep.added_memory / 2**20:+.1f} MiB of buffers against stock; held, in MiB: "
        f"{escape(parts)}{mark}",
        highlight=False,
    )


def _classes(sweep: Sweep, temp: float, mark: str) -> Table:
    table = _table(
        f"temperature {temp:g}{mark}",
        "class, depth",
        ("tokens", "accepted", "by position", "length", "tok/s", "min-max", "ratio"),
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
                table.add_row(*row, "")
            else:
                same = bool(sweep.synthetic) or series.same_tokens(plain)
                parted = parted or not same
                table.add_row(*row, f"{median(series.ratios(plain)):.2f}{' ' if same else '*'}")
    if parted:
        table.caption = (
            "* the text parted from that of plain decoding, which rounding may cause; "
            "llama-mtp doctor tells"
        )
    return table


def _means(sweep: Sweep, mark: str) -> Table:
    table = _table(
        f"all classes, geometric mean of the ratios{mark}",
        "temperature, depth",
        ("accepted", "by position", "length", "ratio", "worst", "best"),
    )
    for temp in sweep.temps:
        table.add_row(f"[bold]{temp:g}[/]")
        for variant in sweep.variants:
            if variant != "plain":
                low, high = spread(sweep.ratio(name, temp, variant) for name in sweep.names)
                table.add_row(
                    f"  {variant}",
                    *_drafts(sweep.stats(variant, temp)),
                    f"{sweep.mean_ratio(temp, variant):.2f}",
                    f"{low:.2f}",
                    f"{high:.2f}",
                )
    return table


def _phases(sweep: Sweep, mark: str) -> Table:
    table = _table(f"a round, in µs{mark}", "depth", ())
    shown = {v: phases(sweep.stats(v)) for v in sweep.variants if v != "plain"}
    for name in next((p for p in shown.values() if p), {}):
        table.add_column(name, justify="right")
    for variant, parts in shown.items():
        table.add_row(str(variant), *(f"{us:,.1f}" for us in parts.values()))
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


def _table(title: str, left: str, right: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0),
    )
    table.add_column(left, no_wrap=True, min_width=len(left))
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _show_prompt(console: Console, prompt: Prompt, mark: str) -> None:
    console.print(
        f"prompt of {prompt.n_tokens} tokens, to the second token: {prompt.plain_rate:.0f} tok/s "
        f"plain, {prompt.mtp_rate:.0f} with MTP; takes {prompt.ratio:.2f} times as long{mark}",
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
        speed.axhline(1.0, color="black", linewidth=1)
        speed.set_xticks(range(len(sweep.names)), sweep.names, rotation=25, ha="right")
        speed.set_ylabel("speed over plain decoding")
        speed.set_title(f"speed-up, temperature {temp:g} (bars: median, lines: min to max)")
        speed.margins(x=0.01)
        speed.set_ylim(0, max(1.0, speed.get_ylim()[1]) * 1.15)  # room for the legend
        speed.legend(ncols=len(variants), fontsize=9, loc="upper center", frameon=False)
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
