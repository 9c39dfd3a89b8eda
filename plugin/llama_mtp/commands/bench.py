"""``llama-mtp bench``: plain decoding against every depth on one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import GpuLayers, Threads, thread_options
from .show import console


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
    n_gpu_layers: GpuLayers = 0,
    spec_draft_n_max: Annotated[
        int, typer.Option(min=0, max=64, help="Bound on the adaptive depth.")
    ] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up and acceptance here (PNG, SVG, PDF).")
    ] = None,
) -> None:
    """Plain decoding against every depth on any GGUF: nine classes of prompts, turn by turn.

    The default run writes up to 62,000 tokens; --repeats, --max-tokens, --classes, --temp and
    --depths make it shorter.
    """
    from ..measure.bench import parse_depths
    from ..measure.bench_report import run_bench
    from ..measure.pairs import PROMPTS

    names = [name for text in classes or () for name in text.split(",")] or list(PROMPTS)
    if not set(names) <= set(PROMPTS):
        raise typer.BadParameter(f"--classes is one of {', '.join(PROMPTS)}")
    head: dict[str, Any] = {} if draft_model is None else {"spec_draft_model": str(draft_model)}
    run_bench(
        console,
        model,
        prompts={name: PROMPTS[name] for name in names},
        temps=list(dict.fromkeys(temp or [0.0, 0.8])),
        depths=parse_depths(depths),
        max_tokens=max_tokens,
        repeats=repeats,
        bound=spec_draft_n_max,
        json_file=json_file,
        plot=plot,
        n_ctx=n_ctx,
        n_gpu_layers=n_gpu_layers,
        **thread_options(threads),
        **head,
    )
