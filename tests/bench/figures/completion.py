"""Print what a completion costs in Python, and what log-probabilities cost in memory.

    python tests/bench/figures/completion.py [TOKENS]

Time per token is all that is not decoding or sampling, over the 200 tokens up to the given length,
on a constructed model and one thread. Stock's is what it spends outside ``generate``; ours counts
the Python in ``generate`` too. Memory is the largest resident set of a process that completes
TOKENS (4,000 unless told; 0: to the end, minutes) in a context of 32,768 with 49,148 words.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import models
from rich.console import Console
from rich.table import Table

from llama_mtp import Llama

LENGTHS = (500, 2000, 4000)
OPTIONS: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
MTP: dict[str, Any] = {"spec_type": "draft-mtp", "spec_adaptive": False}
WINDOW = 200
N_CTX = 32_768
N_WORDS = 48_889  # prime, and with bytes and special tokens 49,148

PEAK = """
import re, sys
from llama_mtp import Llama
llm = Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_threads=1, n_threads_batch=1, verbose=False,
            spec_type="draft-mtp", spec_adaptive=False)
answer = llm.create_completion(
    "hello", max_tokens=int(sys.argv[3]), temperature=0.0, logprobs=eval(sys.argv[4])
)
# Not getrusage: its maximum begins with the parent's.
status = open("/proc/self/status").read()
print(answer["usage"]["completion_tokens"], status.split("VmHWM:")[1].split()[0])
"""


def microseconds(llama: Any, stream: bool) -> list[float]:
    """Return the time per token outside decode and sampling at each of ``LENGTHS``."""
    marks: list[int] = []
    generate: Callable[..., Iterator[int]] = llama.generate

    def booked() -> int:
        stats = llama.spec_stats
        return int(stats.target_ns + stats.draft_ns + stats.sample_ns)

    def timed(*args: Any, **options: Any) -> Iterator[int]:
        tokens = generate(*args, **options)
        inside = 0
        while True:
            start = time.perf_counter_ns()
            token = next(tokens, None)
            now = time.perf_counter_ns()
            inside += now - start
            marks.append(now - (inside if llama.spec_type == "none" else booked()))
            if token is None:
                return
            yield token

    llama.generate = timed
    answer = llama.create_completion(
        "hello", max_tokens=max(LENGTHS), temperature=0.0, stop=["?!"], stream=stream
    )
    for _ in answer if stream else [answer]:
        pass
    return [(marks[n - 1] - marks[n - 1 - WINDOW]) / WINDOW / 1e3 for n in LENGTHS]


def peak(path: Path, max_tokens: int, logprobs: int | None) -> tuple[int, float]:
    """Return tokens completed, and the largest resident set in MB."""
    arguments = [str(path), str(N_CTX), str(max_tokens), repr(logprobs)]
    command = [sys.executable, "-c", PEAK, *arguments]
    tokens, kilobytes = subprocess.check_output(command).split()
    return int(tokens), int(kilobytes) * 1024 / 1e6


def main() -> None:
    max_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    table = Table("microseconds a token", *(f"at {n}" for n in LENGTHS), "goal")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = models.build(folder / "small.gguf", "qwen35")
        for label, spec, goal in (
            ("stock", {"spec_type": "none"}, ""),
            ("ours", MTP, f"100 at {max(LENGTHS)}"),
        ):
            for stream in (False, True):
                with Llama(str(small.path), n_ctx=max(LENGTHS) + 64, **OPTIONS, **spec) as llama:
                    row = [f"{us:.1f}" for us in microseconds(llama, stream)]
                table.add_row(f"{label}, {'streaming' if stream else 'whole'}", *row, goal)
        Console().print(table)

        models.N_WORDS, models.N_VOCAB = N_WORDS, models.FIRST_WORD + N_WORDS
        large = models.build(folder / "large.gguf", "hy_v3")
        tokens, without = peak(large.path, max_tokens, None)
        _, with_five = peak(large.path, max_tokens, 5)
        Console().print(
            f"logprobs=5, {tokens} tokens, n_ctx {N_CTX}, {models.N_VOCAB} in the vocabulary: "
            f"{with_five - without:.1f} MB more ({without:.0f} to {with_five:.0f} MB; goal 50)"
        )


if __name__ == "__main__":
    main()
