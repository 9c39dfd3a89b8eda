"""Print what drafts lose and save where the head has a part of the vocabulary only, measured here.

    python tests/bench/figures/narrow.py MODEL.gguf [--tokens 4096,8192,16384] [--answer 192]

For the model's own head and for a narrow one of each size, at constant depth 3, greedy, over the
nine classes of prompts: how much of the text that was not counted the kept tokens cover, how many
first drafts were accepted, tokens a round (exact, whatever else the machine does), and what a
decode of the draft context takes, as the median over the classes. The texts must all be the same.
"""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from prefill import answer
from rich.console import Console
from rich.table import Table

from llama_mtp import Llama
from llama_mtp.engine.native import ffi, lib
from llama_mtp.heads.narrow import narrow
from llama_mtp.measure.pairs import PROMPTS, chat_tokens, quiet_host

DEPTH = 3


def measure(llama: Llama, n_tokens: int) -> tuple[float, float, float, list[list[int]]]:
    """First drafts accepted, tokens a round, ms of a draft decode, and the answers."""
    assert llama._session is not None
    before, after = ffi.new("struct mtp_counters *"), ffi.new("struct mtp_counters *")
    rounds = accepted = first = tested = 0
    milliseconds, answers = [], []
    for prompt in PROMPTS.values():
        lib.mtp_session_counters(llama._session._handle, before)
        text, last = answer(llama, chat_tokens(llama, prompt), n_tokens)
        answers.append(text)
        lib.mtp_session_counters(llama._session._handle, after)
        decodes = after.n_draft_decodes - before.n_draft_decodes
        milliseconds.append((after.draft_ns - before.draft_ns) / decodes / 1e6)
        rounds += last.num_drafts
        accepted += last.num_accepted_tokens
        first += last.num_accepted_per_pos[0]
        tested += last.num_tested_per_pos[0]
    return first / tested, 1 + accepted / rounds, median(milliseconds), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", default="4096,8192,16384,32768", help="sizes of narrow heads")
    parser.add_argument("--answer", type=int, default=192, help="tokens per answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    quiet_host()
    console = Console(width=100)
    table = Table(title=f"{len(PROMPTS)} answers of {a.answer} tokens, depth {DEPTH}")
    for column in ("tokens", "covers", "first drafts", "tokens a round", "ms a draft", "same text"):
        table.add_column(column, justify="right")
    reference: list[list[int]] | None = None
    with TemporaryDirectory() as folder:
        for n_tokens in (None, *(int(n) for n in a.tokens.split(","))):
            head: dict[str, Any] = {}
            size, covers = "all", ""
            if n_tokens is not None:
                written = narrow(a.model, Path(folder, f"{n_tokens}.gguf"), n_tokens=n_tokens)
                head = {"spec_draft_model": str(written.path)}
                size, covers = f"{n_tokens:,}", f"{written.coverage:.1%}"
            with closing(
                Llama(
                    str(a.model),
                    spec_type="draft-mtp",
                    spec_draft_n_max=DEPTH,
                    spec_adaptive=False,
                    n_ctx=1024,
                    n_threads=a.threads,
                    n_threads_batch=a.threads,
                    verbose=False,
                    **head,
                )
            ) as llama:
                first, length, ms, answers = measure(llama, a.answer)
            reference = reference or answers
            same = str(answers == reference)
            table.add_row(size, covers, f"{first:.1%}", f"{length:.3f}", f"{ms:.2f}", same)
    console.print(table)


if __name__ == "__main__":
    main()
