"""Print what the draft context's n_ubatch costs: memory, and time to read a prompt.

    python tests/bench/figures/catch_up.py MODEL.gguf [--rows 1024] [--runs 7] [--threads N]

For each n_ubatch: the compute buffer as the host reports it, the time of one decode of ``--rows``
rows (the median), and the median of its ratios to that of the largest n_ubatch in the same turn.
All contexts are of one object and take turns, each turn beginning with another.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llama_mtp import Llama, host
from llama_mtp.measure.pairs import quiet_host

SIZES = (512, 256, 128, 64, 32, 16, 8)


class Rows:
    """A batch of random hidden rows and tokens, as after a prompt: the last row is an output."""

    def __init__(self, n: int, n_embd: int, n_vocab: int) -> None:
        rng = np.random.default_rng(1)
        self._embd = rng.normal(size=(n, n_embd)).astype(np.float32)
        self.batch = host.C.llama_batch_init(n, 0, 1)
        self.batch.embd = self._embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self.batch.n_tokens = n
        for i, token in enumerate(rng.integers(0, n_vocab, n)):
            self.batch.token[i], self.batch.pos[i] = int(token), i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = i == n - 1

    def seconds(self, context: Any) -> float:
        """Decode them from an empty memory."""
        host.C.llama_memory_clear(context.memory, False)
        start = time.perf_counter()
        status = host.C.llama_decode(context.ctx, self.batch)
        host.C.llama_synchronize(context.ctx)
        done = time.perf_counter()
        if status != 0:
            raise SystemExit(f"llama_decode returned {status}.")
        return done - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    with (
        quiet_host(),
        Llama(
            str(a.model),
            spec_type="draft-mtp",
            n_ctx=max(4096, a.rows),
            n_batch=a.rows,
            n_ubatch=SIZES[0],
            n_threads=a.threads,
            n_threads_batch=a.threads,
            verbose=False,
        ) as llm,
    ):
        contexts, held = {}, {}
        for n_ubatch in SIZES:
            with host.BufferSizes() as sizes:
                contexts[n_ubatch] = host.draft_context(
                    llm._ctx,
                    llm.context_params,
                    n_ubatch=n_ubatch,
                    type_k=None,
                    type_v=None,
                    verbose=False,
                )
            held[n_ubatch] = sizes.bytes["compute"]
        rows = Rows(a.rows, host.C.llama_model_n_embd_out(llm._model.model), llm.n_vocab())
        for context in contexts.values():
            rows.seconds(context)
        times: dict[int, list[float]] = {n_ubatch: [] for n_ubatch in SIZES}
        for turn in range(a.runs):
            first = turn % len(SIZES)
            for n_ubatch in SIZES[first:] + SIZES[:first]:
                times[n_ubatch].append(rows.seconds(contexts[n_ubatch]))
        for context in contexts.values():
            context.close()
    table = Table(title=f"{a.model.name}: {a.rows} rows, load {os.getloadavg()[0]:.1f}")
    for column in ("n_ubatch", "compute, MiB", "ms", f"to n_ubatch {SIZES[0]}"):
        table.add_column(column, justify="right")
    for n_ubatch in SIZES:
        ratios = [t / full for t, full in zip(times[n_ubatch], times[SIZES[0]], strict=True)]
        table.add_row(
            str(n_ubatch),
            f"{held[n_ubatch] / 2**20:.2f}",
            f"{1e3 * median(times[n_ubatch]):.1f}",
            f"{median(ratios):.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
