"""Print what a bound on the prompt rows that the draft reads costs and saves, measured here.

    python tests/bench/figures/prefill.py MODEL.gguf [--tokens 1500] [--runs 5] [--prompts 4]

For each window, at constant depth 3, greedy, over the same prompts and answers (exact, whatever
else the machine does): how many of the first drafts of a round were accepted, of all drafts, and
tokens a round. Then times against stock, as medians of the ratios of runs that alternate with it:

    read     what the draft context takes to read the prompt: in the first round that drafts, and
             before, where it may not drop what does not fit its queue
    first    from the prompt to the first token
    plain    from the prompt to the second token, without drafts
    drafted  the same with a round of one draft in between, which has the draft context read first

The prompts are passages of this repository's pages and of its tests, in turn.
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
from llama_mtp.engine.native import ffi, lib

WINDOWS = (16, 64, 128, 256, 512, 0)
DEPTH = 3


def passages(llama: Any, n_tokens: int, n: int) -> Iterator[list[int]]:
    """Yield ``n`` prompts of ``n_tokens`` tokens, in the chat template's ChatML where it fits."""
    root = Path(__file__).parents[3]
    pages = [root / "README.md", root / "CONTRIBUTING.md"]
    for folder in ("examples", "hooks", "native", "plugin"):
        pages += sorted((root / folder).rglob("*.md"))
    texts = [pages, sorted((root / "tests").rglob("test_*.py"))]
    head = llama.tokenize(b"<|im_start|>user\nRead this.\n", special=True)
    tail = llama.tokenize(
        b"\nSay what it is about.<|im_end|>\n<|im_start|>assistant\n", add_bos=False, special=True
    )
    size = n_tokens - len(head) - len(tail)
    for i in range(n):
        text = "\n".join(f.read_text(encoding="utf-8") for f in texts[i % 2])
        tokens = llama.tokenize(text.encode(), add_bos=False)
        step = len(tokens) // -(-n // 2)
        if not 0 < size <= step:
            raise SystemExit(f"--tokens {n_tokens} times --prompts {n} is not what the texts give.")
        start = i // 2 * step
        yield [*head, *tokens[start : start + size], *tail]


def forget(llama: Any) -> None:
    """Start from nothing: no prefix is reused, and no checkpoint."""
    llama.reset()
    llama._ctx.kv_cache_clear()
    llama.n_tokens = 0


def draft_seconds(llama: Any) -> float:
    """Seconds that the draft context has spent in decodes since it was made."""
    counters = ffi.new("struct mtp_counters *")
    lib.mtp_session_counters(llama._session._handle, counters)
    return float(counters.draft_ns) / 1e9


def seconds_to_tokens(llama: Any, prompt: list[int]) -> tuple[float, float]:
    """Seconds from a prompt to the first and to the second token."""
    forget(llama)
    start = time.perf_counter()
    stream = llama.generate(prompt, temp=0.0)
    next(stream)
    first = time.perf_counter() - start
    next(stream)
    second = time.perf_counter() - start
    stream.close()
    return first, second


def timed(stock: Any, ours: Any, prompt: list[int], stock_first: bool) -> tuple[float, ...]:
    """Ratios to stock of one reading of the prompt: read, first, plain, drafted."""
    sides = {}
    for side in ("stock", "plain", "drafted") if stock_first else ("drafted", "plain", "stock"):
        if side == "stock":
            sides[side] = seconds_to_tokens(stock, prompt)
        else:
            before = draft_seconds(ours)
            with ours.spec_constant_depth(int(side == "drafted")):
                sides[side] = seconds_to_tokens(ours, prompt)
            if side == "drafted":
                read = draft_seconds(ours) - before
    first, second = sides["stock"]
    plain, drafted = sides["plain"], sides["drafted"]
    return read / first, plain[0] / first, plain[1] / second, drafted[1] / second


def answer(llama: Any, prompt: list[int], n_tokens: int) -> tuple[list[int], Any]:
    """The greedy text after a prompt that nothing is known of, and its statistics."""
    forget(llama)
    stream = llama.generate(prompt, temp=0.0)
    text = list(islice(stream, n_tokens))
    stream.close()
    return text, llama.spec_stats.last


def acceptance(
    llama: Any, prompts: list[list[int]], n_tokens: int
) -> tuple[float, float, float, list[list[int]]]:
    """First drafts accepted, all drafts accepted, tokens a round; and the answers."""
    rounds = drafted = accepted = 0
    first, tested = 0, 0
    answers = []
    for prompt in prompts:
        text, last = answer(llama, prompt, n_tokens)
        answers.append(text)
        rounds += last.num_drafts
        drafted += last.num_draft_tokens
        accepted += last.num_accepted_tokens
        first += last.num_accepted_per_pos[0]
        tested += last.num_tested_per_pos[0]
    return first / tested, accepted / drafted, 1 + accepted / rounds, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS, help="0: all rows")
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5, help="0: acceptance alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    options: dict[str, Any] = {
        "n_ctx": a.tokens + a.answer + 8,
        "n_threads": a.threads,
        "n_threads_batch": a.threads,
        "verbose": False,
    }
    with ExitStack() as stack:
        stock = stack.enter_context(closing(llama_cpp.Llama(str(a.model), **options)))
        prompts = list(passages(stock, a.tokens, a.prompts))
        console = Console(width=100)
        table = Table(title=f"{a.prompts} prompts of {a.tokens} tokens, load {os.getloadavg()[0]}")
        headings = ("window", "first draft", "drafts", "tokens a round", "same text")
        for column in (*headings, "read", "first", "plain", "drafted"):
            table.add_column(column, justify="right")
        reference: list[list[int]] | None = None
        for window in a.windows:
            os.environ["LLAMA_MTP_PREFILL_WINDOW"] = str(window)
            with closing(
                Llama(
                    str(a.model),
                    spec_type="draft-mtp",
                    spec_draft_n_max=DEPTH,
                    spec_adaptive=False,
                    **options,
                )
            ) as ours:
                first, drafts, length, answers = acceptance(ours, prompts, a.answer)
                reference = reference or answers
                row = [
                    str(window or "all"),
                    f"{first:.1%}",
                    f"{drafts:.1%}",
                    f"{length:.3f}",
                    str(answers == reference),
                ]
                console.print(*row)  # the rest takes longer
                ratios = [
                    timed(stock, ours, prompts[i % len(prompts)], stock_first=i % 2 == 0)
                    for i in range(a.runs)
                ]
            columns = [median(kind) for kind in zip(*ratios, strict=True)]
            table.add_row(*row, *(f"{ratio:.3f}" for ratio in columns))
        console.print(table)


if __name__ == "__main__":
    main()
