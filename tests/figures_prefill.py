"""Print what a bound on the prompt rows that the draft reads costs and saves, measured here.

    python tests/figures_prefill.py MODEL.gguf [--tokens 1500] [--runs 5] [--prompts 4]

For each window: the mean number of tokens a round at constant depth 3, greedy, over the same
prompts and answers (exact, whatever else the machine does), and the time from the prompt to the
second token against stock, as the median of the ratios of runs that alternate with stock. The
prompts are passages of a text that this script makes from the sources beside it, in English.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp
from rich.console import Console
from rich.table import Table

from llama_mtp import Llama

WINDOWS: tuple[int | None, ...] = (16, 64, 256, 1024, None)
ANSWER = 128
DEPTH = 3


def passages(llama: Any, n_tokens: int, n: int) -> Iterator[list[int]]:
    """Yield ``n`` prompts of ``n_tokens`` tokens, in the chat template's ChatML where it fits."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    text = "\n".join(f.read_text(encoding="utf-8") for f in files)
    tokens = llama.tokenize(text.encode(), add_bos=False)
    head = llama.tokenize(b"<|im_start|>user\nRead this program.\n", special=True)
    tail = llama.tokenize(
        b"\nSay what it does.<|im_end|>\n<|im_start|>assistant\n", add_bos=False, special=True
    )
    size = n_tokens - len(head) - len(tail)
    if size < 1 or n * size > len(tokens):
        raise SystemExit(f"--tokens {n_tokens} times --prompts {n} is not what the text gives.")
    step = len(tokens) // n
    for i in range(n):
        yield [*head, *tokens[i * step : i * step + size], *tail]


def seconds_to_second_token(llama: Any, prompt: list[int]) -> float:
    """Read a prompt from nothing: the draft catches up before the second token."""
    llama.reset()
    llama._ctx.kv_cache_clear()
    llama.n_tokens = 0
    start = time.perf_counter()
    stream = llama.generate(prompt, temp=0.0)
    next(stream), next(stream)
    done = time.perf_counter() - start
    stream.close()
    return done


def tokens_a_round(llama: Any, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Return the mean over all rounds of all prompts, and the answers."""
    rounds = accepted = 0
    answers = []
    for prompt in prompts:
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.n_tokens = 0
        stream = llama.generate(prompt, temp=0.0)
        answers.append(list(islice(stream, ANSWER)))
        stream.close()
        last = llama.spec_stats.last
        rounds += last.num_drafts
        accepted += last.num_accepted_tokens
    return 1 + accepted / rounds, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    options: dict[str, Any] = {
        "n_ctx": a.tokens + 2 * ANSWER,
        "n_threads": a.threads,
        "n_threads_batch": a.threads,
        "verbose": False,
    }
    with ExitStack() as stack:
        stock = stack.enter_context(closing(llama_cpp.Llama(str(a.model), **options)))
        prompts = list(passages(stock, a.tokens, a.prompts))
        console = Console(width=100)
        table = Table(title=f"{a.prompts} prompts of {a.tokens} tokens, load {os.getloadavg()[0]}")
        for column in ("window", "tokens a round", "prompt, ms", "stock, ms", "ratio", "same text"):
            table.add_column(column, justify="right")
        first: list[list[int]] | None = None
        for window in WINDOWS:
            with closing(
                Llama(
                    str(a.model),
                    spec_type="draft-mtp",
                    spec_draft_n_max=DEPTH,
                    spec_draft_adaptive=False,
                    spec_prefill_window=window,
                    **options,
                )
            ) as ours:
                mean, answers = tokens_a_round(ours, prompts)
                console.print(
                    f"window {window}: {mean:.3f} tokens a round"
                )  # the rest takes longer
                first = first or answers
                times = []
                for i in range(a.runs):
                    prompt = prompts[i % len(prompts)]
                    pair = [
                        seconds_to_second_token(x, prompt) for x in (stock, ours)[:: 1 - i % 2 * 2]
                    ]
                    times.append(pair[:: 1 - i % 2 * 2])
            table.add_row(
                "all" if window is None else str(window),
                f"{mean:.3f}",
                f"{1e3 * median(t[1] for t in times):.0f}",
                f"{1e3 * median(t[0] for t in times):.0f}",
                f"{median(t[1] / t[0] for t in times):.3f}",
                str(answers == first),
            )
        console.print(table)


if __name__ == "__main__":
    main()
