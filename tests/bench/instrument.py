"""Every depth against stock on one file, with intervals, bounds and where a round's time goes.

    python tests/bench/instrument.py FILE [--repeats 7] [--depths 1,2,3,adaptive] [--max-tokens 192]
    python tests/bench/instrument.py FILE --fresh [--synthetic 0]

``llama-mtp bench`` measures the same and tells less. Here every ratio has an interval: of a median
by order statistics (six turns or more for 95 %), of a mean over classes by drawing turns anew. The
*bound* of a class is the speed-up of the best fixed depth, computed from what a round costs and
from the acceptance of the class (see ``bounds.py``).

``--fresh`` makes new objects at every turn instead, and compares their first generation and their
second with those of new stock objects: what the adaptive depth costs while it knows nothing yet.
``--synthetic P0,P1,..`` lets a seeded coin accept the draft at position i with the chance Pi. The
text is then nonsense, and no speed is one of the model; what a round costs at that acceptance is.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import bounds
import tables
from bounds import Limit
from intervals import mean_interval, median_interval
from rich.console import Console

from llama_mtp.commands.main import errors_in_one_line
from llama_mtp.commands.options import thread_options
from llama_mtp.engine.stats import SpecStats
from llama_mtp.errors import LlamaMtpError
from llama_mtp.measure import bench_report
from llama_mtp.measure.bench import Figures, Series, Variant, measure, parse_depths, variants_of
from llama_mtp.measure.pairs import PROMPTS, Run, chat_tokens, generate, open_pair, quiet_host

Pair = tuple[Any, Any]  # a stock object, and one with MTP
Done = Callable[[str], None]

PROMPT_TOKENS = 512  # of the text that prompt processing is timed on, where the context has room
GENERATIONS = 2  # of every new object that measure_fresh() looks at


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
class Sweep:
    """All that was measured on one pair of objects.

    Attributes:
        figures: of all classes, temperatures and depths.
        prompt: prompt processing.
        memory: bytes of the object with MTP by context, part and device.
        added_memory: bytes of its buffers less those of stock.
        deepest: bound on the adaptive depth.
        synthetic: chances that a coin accepted the draft at each position, in place of the model.
        about: file, versions, threads.
    """

    figures: Figures
    prompt: Prompt
    memory: Mapping[str, int]
    added_memory: int
    deepest: int
    synthetic: tuple[float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def limits(self, temp: float) -> list[Limit]:
        return bounds.limits_of(self.figures, temp, self.deepest)

    def mean_limit(self, temp: float) -> Limit:
        return bounds.mean_limit(self.figures, temp, self.deepest)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokens, in types that JSON knows; times in seconds or ns."""
        temps = self.figures.temps
        return {
            **self.about,
            "meaningless": bool(self.synthetic),
            "synthetic": list(self.synthetic),
            **with_intervals(self.figures),
            "bounds": [limit.to_dict() for temp in temps for limit in self.limits(temp)],
            "mean_bounds": [self.mean_limit(temp).to_dict() for temp in temps],
            "round_costs_in_plain_tokens": bounds.round_costs(self.figures),
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
            "generations": [with_intervals(figures) for figures in self.generations],
        }


def with_intervals(figures: Figures) -> dict[str, Any]:
    """Rows and means in types that JSON knows, every ratio with its interval."""

    def of(row: Mapping[str, Any]) -> Any:
        ratios = [figures.ratios(name, row["temperature"], row["depth"]) for name in figures.names]
        return mean_interval(ratios)

    return {
        "series": [
            {**row, "ratio_interval": list(median_interval(row["ratios"]))}
            for row in figures.rows()
        ],
        "means": [{**row, "ratio_interval": list(of(row))} for row in figures.mean_rows()],
    }


# --- measuring ------------------------------------------------------------------------------------


def time_prompt(plain: Any, mtp: Any, repeats: int) -> Prompt:
    """Time one long text in turn, plain and with MTP; the first turn is not kept."""
    text = "\n".join(PROMPTS.values()) * 8
    most = min(PROMPT_TOKENS, plain.n_ctx() - 32)
    prompt = plain.tokenize(text.encode())[:most]
    depth = min(1, mtp._session.setup.depth)
    times: dict[bool, list[float]] = {False: [], True: []}
    catch_up = []
    for turn in range(repeats + 1):
        for with_mtp in (False, True) if turn % 2 else (True, False):
            llm = mtp if with_mtp else plain
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
    pair: Callable[[], AbstractContextManager[Pair]],
    names: Sequence[str],
    temps: Sequence[float],
    max_tokens: int,
    repeats: int,
    *,
    go_on: bool = False,
    done: Done = lambda text: None,
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
            taken: dict[tuple[int, Variant], list[tuple[Run, SpecStats]]] = {k: [] for k in keys}
            for turn in range(repeats):
                with pair() as (plain, mtp):
                    prompt = chat_tokens(plain, PROMPTS[name])
                    for i in range(GENERATIONS):
                        for side in sides if (turn + i) % 2 == 0 else sides[::-1]:
                            llm = plain if side == "plain" else mtp
                            how: dict[str, Any] = {"temp": temp, "seed": 1 + turn, "go_on": go_on}
                            run = generate(llm, prompt, max_tokens, **how)
                            last = mtp.spec_stats.last if side == "adaptive" else None
                            taken[i, side].append((run, last or SpecStats()))
                            done(f"{name}, temperature {temp:g}, generation {i + 1}")
            for (i, side), pairs in taken.items():
                runs, counters = zip(*pairs, strict=True)
                found[i].append(Series(name, temp, side, runs, counters))
    return tuple(map(Figures, found))


# --- the program ----------------------------------------------------------------------------------


def run_sweep(
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
    """Measure every depth on the GGUF at `path`; `options` goes to ``Llama`` on both sides.

    Raises LlamaMtpError where a file could not be written in the end, before anything is measured.
    """
    bench_report.require_writable(json_file, plot)
    n_max = max([bound, *(int(depth) for depth in depths if depth != "adaptive")])
    about = _about(path, max_tokens, repeats, bound, options)
    with open_pair(path, verbose=False, spec_draft_n_max=n_max, **options) as (plain, mtp, added):
        mtp.spec_depth = min(bound, mtp.spec_depth)
        session = mtp._session
        assert session is not None
        if synthetic:
            session.accept_by_coin(synthetic)
            console.print(f"[bold red]{tables.MEANINGLESS}[/]", highlight=False)
        variants = variants_of(mtp, depths)
        if left_out := [str(depth) for depth in depths if depth not in variants]:
            console.print(f"left out, deeper than this file drafts: {', '.join(left_out)}")
        n_runs = len(names) * len(temps) * len(variants) * repeats
        with quiet_host(), bench_report.progress(console, n_runs) as done:
            prompt = time_prompt(plain, mtp, repeats)
            figures = measure(
                plain,
                mtp,
                {name: PROMPTS[name] for name in names},
                variants,
                temps=temps,
                max_tokens=max_tokens,
                repeats=repeats,
                go_on=bool(synthetic),
                done=done,
            )
        memory, explained = mtp.spec_memory(by_device=True), session.policy.explain()
    sweep = Sweep(figures, prompt, memory, added, bound, tuple(synthetic), about)
    tables.show_sweep(console, sweep)
    if "adaptive" in variants:
        console.print(f"\nadaptive, in the end: {explained}", highlight=False)
    if json_file is not None:
        bench_report.write_json(json_file, sweep.to_dict())
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
    """Measure the first generations of new objects; as :func:`run_sweep`."""
    bench_report.require_writable(json_file, None)

    @contextmanager
    def pair() -> Iterator[Pair]:
        with open_pair(path, verbose=False, spec_draft_n_max=bound, **options) as (plain, mtp, _):
            if synthetic and mtp._session is not None:
                mtp._session.accept_by_coin(synthetic)
            yield plain, mtp

    n_runs = len(names) * len(temps) * repeats * GENERATIONS * 2
    with quiet_host(), bench_report.progress(console, n_runs) as done:
        generations = measure_fresh(
            pair, names, temps, max_tokens, repeats, go_on=bool(synthetic), done=done
        )
    about = _about(path, max_tokens, repeats, bound, options)
    fresh = Fresh(generations, tuple(synthetic), about)
    tables.show_fresh(console, fresh)
    if json_file is not None:
        bench_report.write_json(json_file, fresh.to_dict())
    return fresh


def draw(sweep: Sweep, file: Path) -> None:
    """Draw what ``llama-mtp bench`` draws, with the bounds, and a mark where a coin decided."""
    title = str(sweep.about.get("file", ""))
    figure = bench_report.picture(sweep.figures, title)
    for speed, temp in zip(figure.axes[::2], sweep.figures.temps, strict=True):
        for place, limit in enumerate(sweep.limits(temp)):
            ends = place - 0.45, place + 0.45
            speed.hlines(limit.bound.ratio, *ends, color="darkorange", linewidth=2.5, zorder=3)
        speed.set_xlabel("orange: what costs and acceptance allow a fixed depth")
    if sweep.synthetic:
        figure.suptitle(f"{title}\n{tables.MEANINGLESS}", color="red")
    figure.savefig(file, dpi=110)


def _about(path: Path, *course: Any) -> dict[str, Any]:
    about = bench_report.about(path, *course)
    try:  # the processor by its name, where the system tells
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model na"))
    except (OSError, StopIteration):
        return about
    return {**about, "machine": f"{name}, {platform.system()}"}


def parse_chances(text: str) -> tuple[float, ...]:
    """Probabilities of a list such as ``0.8,0.5``; LlamaMtpError where it says something else."""
    try:
        chances = tuple(float(word) for word in text.split(","))
    except ValueError:
        chances = (-1.0,)
    if not all(0.0 <= chance <= 1.0 for chance in chances):
        raise LlamaMtpError(f"--synthetic has {text!r}; list probabilities, as in 0.8,0.6,0.4.")
    return chances


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF with a NextN head")
    parser.add_argument("--draft-model", help="a GGUF that holds the head by itself")
    parser.add_argument("--threads", "-t", type=int, help="on both sides; default: all cores")
    parser.add_argument("--max-tokens", type=int, default=192, help="most tokens of a run")
    parser.add_argument("--repeats", type=int, default=3, help="turns per prompt; each runs all")
    parser.add_argument("--classes", help="of prompts, a,b,c; default: all nine")
    parser.add_argument("--temp", type=float, action="append", help="repeatable; default: 0, 0.8")
    parser.add_argument("--depths", default="1,2,3,4,adaptive", help="beside plain decoding")
    parser.add_argument("--n-ctx", type=int, default=2048, help="context length")
    parser.add_argument("--n-gpu-layers", type=int, default=0, help="-1 for all")
    parser.add_argument("--spec-draft-n-max", type=int, default=3, help="bound of the adaptive one")
    parser.add_argument("--json", type=Path, dest="json_file", help="write all figures here")
    parser.add_argument("--plot", type=Path, help="draw speed-up, bounds and acceptance here")
    parser.add_argument("--synthetic", metavar="P0,P1,..", help="a coin accepts the drafts")
    parser.add_argument("--fresh", action="store_true", help="new objects at every turn")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(args.classes.split(","))) if args.classes else list(PROMPTS)
    if not set(names) <= set(PROMPTS):
        parser.error(f"--classes is one of {', '.join(PROMPTS)}")
    if args.fresh and args.plot is not None:
        parser.error("--plot draws depths, and --fresh measures none; leave one out")
    console = Console()
    with errors_in_one_line():
        common: dict[str, Any] = {
            "names": names,
            "temps": list(dict.fromkeys(args.temp or [0.0, 0.8])),
            "max_tokens": args.max_tokens,
            "repeats": args.repeats,
            "bound": args.spec_draft_n_max,
            "json_file": args.json_file,
            "synthetic": () if args.synthetic is None else parse_chances(args.synthetic),
            "n_ctx": args.n_ctx,
            "n_gpu_layers": args.n_gpu_layers,
            **thread_options(args.threads),
            **({} if args.draft_model is None else {"spec_draft_model": args.draft_model}),
        }
        if args.fresh:
            run_fresh(console, args.model, **common)
        else:
            depths = parse_depths(args.depths)
            run_sweep(console, args.model, depths=depths, plot=args.plot, **common)


if __name__ == "__main__":
    main()
