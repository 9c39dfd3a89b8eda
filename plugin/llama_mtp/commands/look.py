"""``llama-mtp inspect``, ``plugins`` and ``doctor``: what a file holds, and what is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import show
from .options import AsJson, Depth, DraftModel, GpuLayers, Threads, thread_options
from .show import console


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


def plugins() -> None:
    """List the spec types that can be used, and plugins that failed to load."""
    console.print(_plugin_table())


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
    from ..measure.doctor import examine, findings

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
        with console.status(f"trying {escape(file.name)} ..."):
            tried = examine(
                str(file),
                None if draft_model is None else str(draft_model),
                n_ctx=n_ctx,
                spec_draft_n_max=depth,
                n_gpu_layers=n_gpu_layers,
                **thread_options(threads),
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
        table.add_row(f"[red]{show.plain(name)}[/]", "broken", show.plain(reason))
    return table
