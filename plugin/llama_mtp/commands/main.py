"""The command line: ``llama-mtp run | demo | bench | graft | split | narrow | inspect | ...``.

Commands import what they need when they run, so that ``llama-mtp --help`` stays quick.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from ..errors import LlamaMtpError
from . import bench, convert, demo, look, run
from .show import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    help="Multi-token prediction for llama-cpp-python.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=run.RunCommand, context_settings={"allow_interspersed_args": False})(run.run)
for command in (
    demo.demo,
    bench.bench,
    convert.graft,
    convert.split,
    convert.narrow,
    convert.strip,
    look.inspect,
    look.plugins,
    look.doctor,
):
    app.command()(command)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """An error of our own ends the process with one line, not with a traceback."""
    try:
        yield
    except LlamaMtpError as error:
        text = f"[red]error:[/] {plain(str(error))}"  # it may quote what a file calls its parts
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def main() -> None:
    """The console script."""
    with errors_in_one_line():
        app()
