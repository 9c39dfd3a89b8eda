"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, help="Threads on both sides; default: all cores."),
]
DraftModel = Annotated[
    Path | None, typer.Option("--draft-model", help="A GGUF that holds the head by itself.")
]
GpuLayers = Annotated[
    int, typer.Option("--n-gpu-layers", help="Layers on the GPU; -1 for all, 0 for none.")
]
Depth = Annotated[int, typer.Option("--depth", min=1, max=64, help="Most tokens to draft.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite a file that is there.")]


def thread_options(threads: int | None) -> dict[str, Any]:
    """Arguments of ``Llama`` for as many threads, or all cores that this process may use."""
    from ..measure.doctor import usable_cores

    n = threads or usable_cores()
    return {"n_threads": n, "n_threads_batch": n}
