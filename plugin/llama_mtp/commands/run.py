"""``llama-mtp run``: a program that uses llama_cpp, unedited, with MTP on."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class RunCommand(TyperCommand):
    """Ends our options where python ends its own: at the script, or after ``-m MODULE``.

    What follows belongs to the program, also where it looks like an option of ours. At the script
    the parser stops by itself.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, end_at_module(args))


def end_at_module(args: list[str]) -> list[str]:
    """Put ``--`` after ``-m MODULE`` or ``-mMODULE``, if that comes before any script."""
    i = 0
    while i < len(args) and args[i].startswith("-") and args[i] not in ("-", "--"):
        if args[i].startswith("-m"):
            end = i + (2 if args[i] == "-m" else 1)
            return [*args[:end], "--", *args[end:]]
        takes_value = args[i].startswith("--spec-") and args[i] != "--spec-adaptive"
        i += 2 if takes_value and "=" not in args[i] else 1
    return args


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
    spec_draft_p_min: Annotated[
        float | None, typer.Option(help="Stop drafting below this probability.")
    ] = None,
    spec_draft_model: Annotated[
        Path | None,
        typer.Option(help="A GGUF that holds the head by itself.", exists=True, dir_okay=False),
    ] = None,
    spec_draft_type_k: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the draft context's K cache.")
    ] = None,
    spec_draft_type_v: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the draft context's V cache.")
    ] = None,
    spec_adaptive: Annotated[
        bool | None, typer.Option(help="Let the depth follow the measured gain, or keep it.")
    ] = None,
) -> None:
    """Run a script or module that uses llama_cpp, unedited, with MTP on."""
    from ..install import install
    from ..registry import RESERVED, resolve
    from ..settings import OPTIONS, read_options

    rest = args or []
    if module is None:
        _require_script(rest)
    given = {
        "spec_type": spec_type,
        "spec_draft_n_max": spec_draft_n_max,
        "spec_draft_p_min": spec_draft_p_min,
        "spec_draft_model": spec_draft_model and spec_draft_model.resolve(),
        "spec_draft_type_k": spec_draft_type_k,
        "spec_draft_type_v": spec_draft_type_v,
        "spec_adaptive": spec_adaptive,
    }
    read_options(**given)
    if spec_type is not None and spec_type not in RESERVED:
        resolve(spec_type)
    for option in OPTIONS.values():
        if given.get(option.keyword) is not None:
            os.environ[option.variable] = str(given[option.keyword])
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


def _require_script(rest: list[str]) -> None:
    if not rest:
        raise typer.BadParameter("name a script, or a module with -m MODULE")
    script = Path(rest[0])
    if not script.exists():
        raise typer.BadParameter(f"there is no file {rest[0]!r}")
    if script.is_dir() and not (script / "__main__.py").exists():
        raise typer.BadParameter(f"{rest[0]!r} is a folder without a __main__.py")
