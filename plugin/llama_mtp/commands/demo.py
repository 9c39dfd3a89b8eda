"""``llama-mtp demo``: SmolLM2 and its trained head, plain and with MTP side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Threads, thread_options
from .show import console, print_grid

if TYPE_CHECKING:
    from ..host import StockLlama
    from ..llama import Llama
    from ..measure.bench import Figures, Variant

PROMPTS: Mapping[str, str] = {
    "capital": "What is the capital of Portugal, and what is it known for?",
    "list": "List the months of the year, one per line, with the number of days of each.",
    "rewrite": "Rewrite this sentence in a formal tone: hey, can you send me the report by friday?",
    "code": "Write a Python function that counts how often each word occurs in a text.",
}
_REPEATS = 3


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
    from ..demo.model import base_model, demo_model
    from ..measure.bench import measure
    from ..measure.bench_report import progress, prompt_table
    from ..measure.pairs import open_pair

    prompts = PROMPTS if prompt is None else {"yours": prompt}
    base = base_model()
    model = demo_model(console, weight_type=weight_type, file=file)
    host = {"n_ctx": 2048, "verbose": False, **thread_options(threads)}
    console.print(
        f"model {model}\nthreads {host['n_threads']} on both sides, greedy\n", highlight=False
    )
    with open_pair(model, spec_adaptive=adaptive, **host) as (plain, mtp, added_memory):
        _answer(mtp, prompts, max_tokens)
        variant: Variant = "adaptive" if adaptive else mtp.spec_depth
        variants: tuple[Variant, ...] = ("plain", variant)
        length: dict[str, Any] = {"max_tokens": max_tokens, "repeats": _REPEATS}
        with progress(console, len(variants) * len(prompts) * _REPEATS) as done:
            figures = measure(plain, mtp, prompts, variants, done=done, **length)
        console.print(prompt_table(figures, 0.0), "")
        _show_summary(mtp, figures, variant, added_memory)
        _show_partings(plain, mtp, prompts, figures, variant, max_tokens)
        gave_up = mtp._session is not None and mtp._session.policy.dropped
    ratio = median(figures.ratio(name, 0.0, variant) for name in prompts)
    plain_rate, mtp_rate = figures.rate(0.0, "plain"), figures.rate(0.0, variant)
    shipped_rate = _plain_rate(base, prompts, max_tokens, host)
    console.print(
        f"\nplain speed of the file as shipped ({base.name}): {shipped_rate:.1f} tok/s; "
        f"of the joined {weight_type} file: {plain_rate:.1f} tok/s.",
        highlight=False,
    )
    tokens_a_round = figures.stats(variant).mean_acceptance_length
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


def _answer(mtp: Llama, prompts: Mapping[str, str], max_tokens: int) -> None:
    for text in prompts.values():
        answer = mtp.create_chat_completion(
            [{"role": "user", "content": text}], temperature=0.0, max_tokens=max_tokens
        )
        console.print(text, style="bold", markup=False, highlight=False)
        console.print(answer["choices"][0]["message"]["content"], markup=False, highlight=False)
        console.print()


def _show_summary(mtp: Llama, figures: Figures, variant: Variant, added_memory: int) -> None:
    """Same tokens, acceptance, added memory, and the cost of a round outside decodes."""
    stats, names = figures.stats(variant), figures.names
    same = sum(not figures.parted(name, 0.0, variant) for name in names)
    draft = sum(size for part, size in mtp.spec_memory().items() if part.startswith("draft "))
    rows = {
        "same tokens": f"{same} of {len(names)} prompts",
        "tokens a round": f"{stats.mean_acceptance_length:.2f}",
        "rounds with a draft": f"{stats.num_drafts} of {stats.num_rounds}",
        "added memory": f"{added_memory / 2**20:+.1f} MiB of buffers against stock; the draft "
        f"context has {draft / 2**20:.1f} MiB",
    }
    if stats.num_rounds:
        rollback, native, python = (
            ns / stats.num_rounds / 1000
            for ns in (stats.rollback_ns, stats.native_overhead_ns, stats.python_ns)
        )
        rows["a round outside decodes"] = (
            f"{rollback:.1f} µs rollback, {native:.1f} µs native, {python:.1f} µs Python"
        )
    if mtp._session is not None:
        rows["depth"] = mtp._session.policy.explain()
    print_grid(console, rows)


def _show_partings(
    plain: StockLlama,
    mtp: Llama,
    prompts: Mapping[str, str],
    figures: Figures,
    variant: Variant,
    max_tokens: int,
) -> None:
    """Where texts parted, say whether the host's own rounding is the cause: the two-part check.

    It runs at the full depth, where batches are largest, whatever depth the policy has reached.
    """
    from ..measure.identity import check_identity
    from ..measure.pairs import chat_tokens

    parted = [name for name in prompts if figures.parted(name, 0.0, variant)]
    depth = mtp.spec_depth
    for name in parted:
        prompt = chat_tokens(plain, prompts[name])
        with mtp.spec_constant_depth(depth):
            report = check_identity(
                plain, mtp, prompt, max_tokens, max_batch=1 + depth, quiet=True, temp=0.0
            )
        for text in [str(parting) for parting in report.divergences] or ["did not part again"]:
            console.print(f"{name}: {text}", highlight=False)
    if parted:
        console.print(
            "A parting is legal where the host itself gives a row other last bits in a batch than "
            "alone, by as much, and its own sampler then picks the same token.",
            highlight=False,
        )


def _plain_rate(
    model: Path, prompts: Mapping[str, str], max_tokens: int, host: Mapping[str, Any]
) -> float:
    """Tokens per second of another file without MTP: the median over the prompts."""
    from ..llama import Llama
    from ..measure.pairs import chat_tokens, generate, quiet_host

    with quiet_host(), Llama(str(model), spec_type="none", **host) as llm:
        generate(llm, chat_tokens(llm, "Count from one to ten."), 16)
        runs = [generate(llm, chat_tokens(llm, text), max_tokens) for text in prompts.values()]
    return median(run.rate for run in runs)
