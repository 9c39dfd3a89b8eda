"""``llama-mtp graft``, ``split``, ``narrow`` and ``strip``: heads onto models, and off them."""

from __future__ import annotations

import contextlib
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .options import Force
from .show import console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
