"""What a text costs whose drafts stop being right half way: never slower, and how soon.

    python tests/bench/figures/collapse.py MODEL.gguf [--turns 7] [--tokens 192]
        [--chances 0.9,0.8,0.7]

A seeded coin accepts the drafts of the first half with ``--chances`` and none of the second, in the
first generation of a new object and in its second. Each is timed beside a new stock object, which
goes first in every other turn. The text is nonsense; what is printed is speed over stock's.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the instrument beside the figures

from instrument import parse_chances
from intervals import median_interval

from llama_mtp import Llama
from llama_mtp.measure.pairs import PROMPTS, chat_tokens, open_pair

PARTS = ("first half", "second half", "whole")


def seconds(llm: Llama, prompt: list[int], tokens: int, chances: tuple[float, ...]) -> list[float]:
    """Time of each half of a text and of both, after its first token; no chances: no coin."""
    session = llm._session
    if chances:
        assert session is not None
        session.accept_by_coin(chances)
    llm.reset()
    llm.set_seed(1)
    text = llm.generate(prompt, temp=0.0)
    next(text)
    start = time.perf_counter()
    list(islice(text, tokens // 2))
    middle = time.perf_counter()
    if chances:
        assert session is not None
        session.accept_by_coin((0.0,))
    list(islice(text, tokens - tokens // 2))
    end = time.perf_counter()
    text.close()
    return [middle - start, end - middle, end - start]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--chances", type=parse_chances, default=(0.9, 0.8, 0.7))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.getLogger("llama_mtp").setLevel(logging.ERROR)  # of the coin, at every text
    console = Console(highlight=False)
    options = {"n_ctx": 2048, "n_threads": args.threads, "n_threads_batch": args.threads}
    ratios: list[dict[str, list[float]]] = [{part: [] for part in PARTS} for _ in range(2)]
    for turn in track(range(args.turns), console=console, transient=True):
        with open_pair(args.model, verbose=False, **options) as (plain, mtp, _):
            prompt = chat_tokens(plain, PROMPTS["qa_factual"])
            for generation in ratios:
                sides = [(plain, ()), (mtp, args.chances)]
                times = {
                    llm: seconds(llm, prompt, args.tokens, chances)
                    for llm, chances in (sides if turn % 2 == 0 else sides[::-1])
                }
                for part, stock, ours in zip(PARTS, times[plain], times[mtp], strict=True):
                    generation[part].append(stock / ours)
    table = Table(
        "generation", *PARTS, title=f"{args.model.name}: speed over stock, {args.turns} turns"
    )
    for name, generation in zip(("first", "second"), ratios, strict=True):
        cells = []
        for part in PARTS:
            interval = median_interval(generation[part])
            cells.append(
                f"{median(generation[part]):.3f} [{interval.low:.3f}, {interval.high:.3f}]"
            )
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
