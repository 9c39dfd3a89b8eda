"""The command line: ``llama-mtp run | demo | bench | inspect | doctor | plugins``.

Commands import what they need when they run, so that ``llama-mtp --help`` stays quick.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from .doctor import default_threads, findings
from .errors import LlamaMtpError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def main() -> None:
    """The console script: an error of our own is one line, not a traceback."""
    try:
        app()
    except LlamaMtpError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


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
) -> None:
    """Run a script or module that uses llama_cpp, unedited, with MTP on."""
    from .install import install

    rest = args or []
    if module is None and not rest:
        raise typer.BadParameter("name a script, or a module with -m MODULE")
    if module is None and not Path(rest[0]).exists():
        raise typer.BadParameter(f"there is no file {rest[0]!r}")
    if spec_type is not None:
        os.environ["LLAMA_ARG_SPEC_TYPE"] = spec_type
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
    from .demo.run import run_demo

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
    threads: Threads = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens per prompt.")] = 192,
    repeats: Annotated[int, typer.Option(min=1, help="Paired runs per prompt.")] = 3,
    n_ctx: Annotated[int, typer.Option(help="Context length.")] = 2048,
    n_gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU; -1 for all.")] = 0,
    spec_draft_n_max: Annotated[int, typer.Option(min=0, help="Most tokens to draft.")] = 3,
    adaptive: Annotated[
        bool, typer.Option(help="Let the depth follow the measured gain, or keep it constant.")
    ] = True,
) -> None:
    """Plain decoding against MTP on any GGUF: nine classes of prompts, paired runs, medians."""
    from .bench import run_bench

    n_threads = threads or default_threads()
    run_bench(
        console,
        model,
        max_tokens=max_tokens,
        repeats=repeats,
        n_ctx=n_ctx,
        n_gpu_layers=n_gpu_layers,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        spec_draft_n_max=spec_draft_n_max,
        spec_draft_adaptive=adaptive,
    )


# --- looking at things ----------------------------------------------------------------------------


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF file.", exists=True, dir_okay=False)],
) -> None:
    """Say whether a GGUF has a NextN head that can run, and if not, why and what to do."""
    from .gguf_tools.inspect import check_head

    report = check_head(file)
    table = Table.grid(padding=(0, 2))
    table.add_row("architecture", report.architecture)
    table.add_row("blocks", f"{report.n_layer_trunk} + {report.n_heads} NextN")
    table.add_row("hidden size", str(report.n_embd))
    table.add_row("trained context", str(report.n_ctx_train))
    if report.missing:
        table.add_row("missing tensors", ", ".join(report.missing))
    if report.executable:
        table.add_row("rollback", report.rollback)
        table.add_row("verdict", "[green]runs with spec_type='draft-mtp'[/]")
    else:
        table.add_row("verdict", f"[red]no MTP:[/] {report.reason}")
        table.add_row("remedy", report.remedy)
    console.print(table)
    if not report.executable:
        raise typer.Exit(1)


@app.command()
def plugins() -> None:
    """List the spec types, who registers them, and plugins that failed to load."""
    console.print(_plugin_table())


@app.command()
def doctor() -> None:
    """Versions, the host's library, the functions found in it, and the plugins."""
    healthy = True
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # the library's whole path
    for finding in findings():
        healthy = healthy and finding.ok
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.what, finding.detail)
    console.print(table)
    console.print(_plugin_table())
    if not healthy:
        raise typer.Exit(1)


def _plugin_table() -> Table:
    from . import registry

    table = Table("spec type", "needs a NextN head", "also called")
    for name, spec_type in registry.spec_types().items():
        if name == spec_type.name:
            needs = "yes" if spec_type.needs_head else "no"
            table.add_row(name, needs, ", ".join(spec_type.aliases))
    for name, reason in registry.broken_plugins().items():
        table.add_row(f"[red]{name}[/]", "broken", reason)
    return table
