"""The command line: ``llama-mtp run | demo | bench | graft | split | narrow | inspect | ...``.

Commands import what they need when they run, so that ``llama-mtp --help`` stays quick.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from ..errors import LlamaMtpError
from ..measure.doctor import default_threads, findings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

app = typer.Typer(
    help="Multi-token prediction for llama-cpp-python.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, help="Threads on both sides; default: all cores."),
]


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """An error of our own ends the process with one line, not with a traceback."""
    try:
        yield
    except LlamaMtpError as error:
        from .show import plain  # an error may quote what a file calls its parts

        text = f"[red]error:[/] {plain(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def main() -> None:
    """The console script."""
    with errors_in_one_line():
        app()


# --- run ------------------------------------------------------------------------------------------


def end_options(args: Sequence[str]) -> list[str]:
    """Put ``--`` where python itself would stop reading options: at the script, or after -m MODULE.

    What follows belongs to the script, also where it looks like an option of ours.
    """
    i = 0
    while i < len(args):
        arg = args[i]
        if arg == "--":
            break
        if arg.startswith("-m"):
            end = i + (2 if arg == "-m" else 1)
            return [*args[:end], "--", *args[end:]]
        if not arg.startswith("-") or arg == "-":
            return [*args[:i], "--", *args[i:]]
        takes_value = arg.startswith("--spec-") and "=" not in arg
        i += 2 if takes_value else 1
    return list(args)


class _RunCommand(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, end_options(args))


@app.command(cls=_RunCommand)
def run(
    args: Annotated[
        list[str] | None, typer.Argument(metavar="SCRIPT.py ARGS...", show_default=False)
    ] = None,
    module: Annotated[
        str | None, typer.Option("-m", metavar="MODULE", help="Run a module, as python -m does.")
    ] = None,
    spec_type: Annotated[
        str | None,
        typer.Option(help="auto, draft-mtp, none, or a type that a plugin registers."),
    ] = None,
    spec_draft_n_max: Annotated[
        int | None, typer.Option(min=0, help="Most tokens to draft per round.")
    ] = None,
    spec_draft_model: Annotated[
        Path | None,
        typer.Option(help="A GGUF that holds the head by itself.", exists=True, dir_okay=False),
    ] = None,
) -> None:
    """Run a script or module that uses llama_cpp, unedited, with MTP on."""
    from ..install import install
    from ..registry import RESERVED, resolve

    rest = args or []
    if module is None and not rest:
        raise typer.BadParameter("name a script, or a module with -m MODULE")
    if module is None and not Path(rest[0]).exists():
        raise typer.BadParameter(f"there is no file {rest[0]!r}")
    if module is None and Path(rest[0]).is_dir() and not Path(rest[0], "__main__.py").exists():
        raise typer.BadParameter(f"{rest[0]!r} is a folder without a __main__.py")
    if spec_type is not None:
        if spec_type not in RESERVED:
            resolve(spec_type)
        os.environ["LLAMA_ARG_SPEC_TYPE"] = spec_type
    if spec_draft_model is not None:
        os.environ["LLAMA_ARG_SPEC_DRAFT_MODEL"] = str(spec_draft_model.resolve())
    if spec_draft_n_max is not None:
        os.environ["LLAMA_ARG_SPEC_DRAFT_N_MAX"] = str(spec_draft_n_max)
    install()
    try:
        # sys.path[0] and sys.argv as python sets them; until here they were the console script's.
        if module is not None:
            sys.path[0] = os.getcwd()
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.realpath(rest[0]))
            sys.argv = rest
            runpy.run_path(rest[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        # Here and not further out: the command-line library would put some of these (EOFError,
        # broken pipes) into words of its own.
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


# --- measurements ---------------------------------------------------------------------------------


@app.command()
def demo(
    prompt: Annotated[
        str | None, typer.Option(help="Your own prompt instead of the built-in ones.")
    ] = None,
    weight_type: Annotated[
        str, typer.Option("--type", help="Weight type of the joined file, for example Q4_0 or F16.")
    ] = "Q4_0",
    threads: Threads = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens per answer.")] = 128,
    file: Annotated[
        Path | None, typer.Option(help="Write the joined file here, not into the user cache.")
    ] = None,
    adaptive: Annotated[
        bool, typer.Option(help="Let the depth follow the measured gain, or keep it constant.")
    ] = True,
) -> None:
    """Answer prompts with SmolLM2 and its trained head, with and without MTP side by side."""
    from ..demo.run import run_demo

    run_demo(
        console,
        prompts=None if prompt is None else {"yours": prompt},
        weight_type=weight_type,
        threads=threads or default_threads(),
        max_tokens=max_tokens,
        file=file,
        adaptive=adaptive,
    )


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="A GGUF with a NextN head.", exists=True)],
    draft_model: Annotated[
        Path | None,
        typer.Option("--draft-model", help="A GGUF that holds the head by itself.", exists=True),
    ] = None,
    threads: Threads = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens per run.")] = 192,
    repeats: Annotated[int, typer.Option(min=1, help="Turns per prompt; each runs all.")] = 3,
    classes: Annotated[
        list[str] | None, typer.Option(help="Classes of prompts, a,b,c. Default: all nine.")
    ] = None,
    temp: Annotated[
        list[float] | None, typer.Option(min=0.0, help="Repeatable. Default: 0 and 0.8.")
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Constant depths, and 'adaptive', beside plain decoding.")
    ] = "1,2,3,4,adaptive",
    n_ctx: Annotated[int, typer.Option(min=256, help="Context length.")] = 2048,
    n_gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU; -1 for all.")] = 0,
    spec_draft_n_max: Annotated[
        int, typer.Option(min=0, max=64, help="Bound on the adaptive depth.")
    ] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up and acceptance here (PNG, SVG, PDF).")
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="P0,P1,..",
            help="Let a seeded coin accept the draft at position i with chance Pi: cost at any "
            "acceptance. The text is nonsense.",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Instead of the depths: new objects at every turn, and how fast the first "
            "generation with MTP is and the second, each against that of a new stock object.",
        ),
    ] = False,
) -> None:
    """Plain decoding against every depth on any GGUF: nine classes of prompts, turn by turn.

    The default run writes up to 62,000 tokens; --repeats, --max-tokens, --classes, --temp and
    --depths make it shorter. With --repeats 6 or more every interval is one of 95 % at least.
    """
    from ..measure.bench import parse_chances, parse_depths
    from ..measure.bench_report import run_bench, run_fresh
    from ..measure.pairs import PROMPTS

    named = (name for text in classes or () for name in text.split(","))
    names = list(dict.fromkeys(named)) or list(PROMPTS)
    for name in names:
        if name not in PROMPTS:
            raise typer.BadParameter(f"--classes is one of {', '.join(PROMPTS)}")
    if fresh and plot is not None:
        raise typer.BadParameter("--plot draws depths, and --fresh measures none; leave one out")
    n_threads = threads or default_threads()
    common: dict[str, Any] = {
        "names": names,
        "temps": list(dict.fromkeys(temp or [0.0, 0.8])),
        "max_tokens": max_tokens,
        "repeats": repeats,
        "bound": spec_draft_n_max,
        "json_file": json_file,
        "synthetic": () if synthetic is None else parse_chances(synthetic),
        "n_ctx": n_ctx,
        "n_gpu_layers": n_gpu_layers,
        "n_threads": n_threads,
        "n_threads_batch": n_threads,
        **({} if draft_model is None else {"spec_draft_model": str(draft_model)}),
    }
    if fresh:
        run_fresh(console, model, **common)
    else:
        run_bench(console, model, depths=parse_depths(depths), plot=plot, **common)


# --- joining and splitting ------------------------------------------------------------------------

Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite a file that is there.")]


@app.command()
def graft(
    base: Annotated[Path, typer.Argument(help="The model: a GGUF without a NextN head.")],
    head: Annotated[
        Path, typer.Argument(help="A GGUF with the head, or the folder of a checkpoint.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    tensor_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Store the head's matrices in another type: F32, F16, BF16, Q8_0, Q6_K, Q5_K, "
            "Q4_K, Q3_K, Q2_K or Q4_0; default: as they are.",
        ),
    ] = None,
    output_type: Annotated[
        str | None,
        typer.Option(
            "--output-type",
            metavar="TYPE",
            help="Give the head an output matrix of its own in this type: drafts then read less.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the head in the place of one that is there.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load base and result, and compare greedy tokens.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Threads for --verify.")
    ] = None,
    force: Force = False,
) -> None:
    """Join a model and a NextN head into one file that runs with MTP."""
    from functools import partial

    from ..gguf.quantize import TYPES
    from ..heads import graft as tool
    from ..measure.compare_files import compare_greedy

    for option, kind in (("--type", tensor_type), ("--output-type", output_type)):
        if kind is not None and kind.upper() not in TYPES:
            raise typer.BadParameter(f"{option} is one of {', '.join(TYPES)}")
    with _writing(out.name) as progress:
        report = tool.graft(
            base,
            head,
            out,
            type=tensor_type,
            output_type=output_type,
            replace_head=replace,
            verify=partial(compare_greedy, n_threads=threads) if verify else None,
            force=force,
            progress=progress,
        )
    types = ", ".join(f"{kind} ({n})" for kind, n in report.head_types.items())
    console.print(f"{report.n_heads} NextN head{'s' * (report.n_heads > 1)}, matrices in {types}")
    for note in report.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    _wrote(report.path)
    _next("llama-mtp inspect", report.path)


@app.command()
def split(
    file: Annotated[Path, typer.Argument(help="A GGUF with a NextN head.")],
    out_dir: Annotated[
        Path | None, typer.Option("--out-dir", help="Where to write; default: beside the file.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a model as two files: NAME-trunk.gguf, and its head as mtp-NAME.gguf."""
    from ..heads import split as tool

    with _writing(file.name) as progress:
        paths = tool.split(file, out_dir, force=force, progress=progress)
    for path in paths:
        _wrote(path)
    _next("llama-mtp inspect", paths[0], "--draft-model", paths[1])


@app.command()
def narrow(
    file: Annotated[Path, typer.Argument(help="A GGUF with a NextN head.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file to write; default: mtp-NAME-narrow.gguf beside it."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=256, help="Tokens to keep; default: an eighth of them, 8192 at least."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file or folder like what you will have written: its frequent tokens are kept. "
            "Repeatable; default: Python's standard library."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a head that has the frequent tokens only, in a file of its own: drafts cost less."""
    from ..heads import narrow as tool

    console.print("counting tokens ...", highlight=False)
    with _writing(file.name) as progress:
        report = tool.narrow(file, out, n_tokens=tokens, texts=text, force=force, progress=progress)
    console.print(
        f"{report.n_tokens:,} of {report.n_vocab:,} tokens"
        + ("" if report.coverage is None else f", {report.coverage:.1%} of such texts")
        + f"; of the output matrix a draft step reads {report.output / 1e6:.1f} MB instead of "
        f"{report.output_before / 1e6:.1f} MB",
        highlight=False,
        soft_wrap=True,
    )
    _wrote(report.path)
    _next("llama-mtp doctor", file, "--draft-model", report.path)


@app.command()
def strip(
    file: Annotated[Path, typer.Argument(help="A GGUF with a NextN head.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; default: NAME-trunk.gguf beside it."),
    ] = None,
    force: Force = False,
) -> None:
    """Write a model without its NextN head."""
    from ..heads import split as tool

    with _writing(file.name) as progress:
        path = tool.strip(file, out, force=force, progress=progress)
    _wrote(path)


@contextlib.contextmanager
def _writing(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar, and let a kill or a closed terminal clean up as an interrupt does."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ends = [number for number in ends if signal.getsignal(number) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, leave)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bar = Progress(*columns, TransferSpeedColumn(), console=console)
    task = bar.add_task(escape(title), total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # only now: what is refused before has nothing to show
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
        for number in ends:
            signal.signal(number, signal.SIG_DFL)


def _wrote(path: Path) -> None:
    size = path.stat().st_size / 1e6
    console.print(f"wrote {path} ({size:.1f} MB)", soft_wrap=True, markup=False)


def _next(command: str, *args: str | Path) -> None:
    line = " ".join([command, *(shlex.quote(str(arg)) for arg in args)])
    console.print(f"Next: {line}", soft_wrap=True, markup=False, highlight=False)


# --- looking at things ----------------------------------------------------------------------------


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")]
DraftModel = Annotated[
    Path | None, typer.Option("--draft-model", help="A GGUF that holds the head by itself.")
]
GpuLayers = Annotated[
    int, typer.Option("--n-gpu-layers", help="Layers on the GPU; -1 for all, 0 for none.")
]
Depth = Annotated[int, typer.Option("--depth", min=1, max=64, help="Most tokens to draft.")]


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF file; of a split one, the first part.")],
    draft_model: DraftModel = None,
    n_ctx: Annotated[int, typer.Option(min=1, help="Context to forecast memory for.")] = 4096,
    depth: Depth = 3,
    n_gpu_layers: GpuLayers = 0,
    probe: Annotated[
        bool, typer.Option(help="Ask the host too, which takes a second, or go by the header.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Say whether a GGUF has a NextN head that runs here, what MTP will cost, and what to do.

    Ends with status 0 if the head runs, 1 if not.
    """
    from ..measure.inspect import ask, inspect_file
    from . import show

    found = inspect_file(file, draft_model=draft_model, n_ctx=n_ctx, depth=depth, probe=False)
    if not as_json:
        show.show_header(console, found)  # at once: the host takes its time
    if probe:
        with console.status("asking the host ..."):
            found = ask(found, options={"n_gpu_layers": n_gpu_layers})
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show.show_verdict(console, found)
    if found.verdict != "run":
        raise typer.Exit(1)


@app.command()
def plugins() -> None:
    """List the spec types that can be used, and plugins that failed to load."""
    console.print(_plugin_table())


@app.command()
def doctor(
    file: Annotated[
        Path | None, typer.Argument(help="A GGUF to try: does MTP pay here?", show_default=False)
    ] = None,
    draft_model: DraftModel = None,
    n_ctx: Annotated[int, typer.Option(min=256, help="Context length.")] = 2048,
    depth: Depth = 3,
    n_gpu_layers: GpuLayers = 0,
    threads: Threads = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to try on each of 3 texts.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Paired runs per text.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Look over the installation; with a file, try it and say whether to turn MTP on here.

    Ends with status 1 if something is missing or broken, or the file's head does not run.
    """
    from .. import registry
    from ..measure.doctor import examine
    from . import show

    found = list(findings())
    healthy = all(finding.ok for finding in found)
    report: dict[str, Any] = {"findings": [vars(finding) for finding in found]}
    if as_json:
        names = {name: spec.needs_head for name, spec in registry.spec_types().items()}
        report |= {"spec_types": names, "broken_plugins": registry.broken_plugins()}
    else:
        show.show_findings(console, found)
        console.print(_plugin_table())
    if file is not None and healthy:
        n_threads = threads or default_threads()
        with console.status(f"trying {escape(file.name)} ..."):
            tried = examine(
                str(file),
                None if draft_model is None else str(draft_model),
                n_ctx=n_ctx,
                spec_draft_n_max=depth,
                n_gpu_layers=n_gpu_layers,
                n_threads=n_threads,
                n_threads_batch=n_threads,
                max_tokens=max_tokens,
                repeats=repeats,
            )
        report |= tried.to_dict()
        healthy = tried.judgement.verdict not in ("broken", "impossible")
        if not as_json:
            if tried.trial is not None:
                cost = tried.inspection.forecast
                show.show_trial(console, tried.trial, (cost and cost.head_weights) or 0)
            show.show_judgement(console, tried.judgement)
    if as_json:
        print(json.dumps(report, indent=2))
    if not healthy:
        raise typer.Exit(1)


def _plugin_table() -> Table:
    from .. import registry

    table = Table("spec type", "needs a NextN head", "also called")
    for name, spec_type in registry.spec_types().items():
        if name == spec_type.name:
            needs = "yes" if spec_type.needs_head else "no"
            table.add_row(name, needs, ", ".join(spec_type.aliases))
    for name, reason in registry.broken_plugins().items():
        table.add_row(f"[red]{name}[/]", "broken", reason)
    return table
