"""Compare the bytes per second of a decode of one row with those of a copy in memory.

    python rate.py big.gguf

A decode of one row reads every weight of the trunk once: all tensors of the file but the blocks of
the head and the token embeddings (one row of them; the whole matrix where it serves as the output
matrix too). A copy of as many bytes by numpy reads and writes each byte once. Its rate here counts
the bytes read, so a decode, which writes next to nothing, may be faster than the copy.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from llama_mtp import Llama
from llama_mtp.commands.main import errors_in_one_line
from llama_mtp.gguf.model import Gguf
from llama_mtp.measure.draft_cost import token_bytes
from llama_mtp.measure.pairs import quiet_host

Bytes = npt.NDArray[np.uint8]


def decode_seconds(path: Path, n_threads: int, tokens: int) -> float:
    """Median seconds of a plain decode of one row, the first few left out."""
    with quiet_host():
        llm = Llama(
            str(path),
            spec_type="none",
            n_ctx=256,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            verbose=False,
        )
    with llm:
        llm.eval([llm.token_bos()])
        times = []
        for _ in range(tokens + 3):
            start = time.perf_counter()
            llm.eval([llm.token_bos()])
            times.append(time.perf_counter() - start)
    return median(times[3:])


def copy_seconds(n_bytes: int, n_threads: int, repeats: int) -> float:
    """Median seconds in which ``n_threads`` copy ``n_bytes`` together, each its own part."""
    source, target = np.ones(n_bytes, dtype=np.uint8), np.zeros(n_bytes, dtype=np.uint8)
    parts = list(
        zip(np.array_split(target, n_threads), np.array_split(source, n_threads), strict=True)
    )
    times = []
    for _ in range(repeats):
        threads = [threading.Thread(target=np.copyto, args=part) for part in parts]
        start = time.perf_counter()
        for thread in threads:  # numpy lets go of the interpreter while it copies
            thread.start()
        for thread in threads:
            thread.join()
        times.append(time.perf_counter() - start)
    return median(times)


def rate(
    model: Annotated[Path, typer.Argument(exists=True, help="A GGUF.")],
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1 and 2.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Decodes to time.")] = 9,
    copies: Annotated[int, typer.Option(min=1, help="Copies to time.")] = 5,
) -> None:
    """Print GB/s (1e9 bytes) of a decode of one row and of a copy of as many bytes."""
    n_bytes = token_bytes(Gguf.open(model))
    print(f"{model}: a decode of one row reads {n_bytes / 1e9:.3f} GB")
    print("threads  ms a row  decode GB/s  copy GB/s  decode to copy")
    for n in threads or [1, 2]:
        copied = n_bytes / copy_seconds(n_bytes, n, copies) / 1e9
        seconds = decode_seconds(model, n, tokens)
        read = n_bytes / seconds / 1e9
        print(f"{n:7}  {seconds * 1e3:8.1f}  {read:11.2f}  {copied:9.2f}  {read / copied:14.2f}")


if __name__ == "__main__":
    with errors_in_one_line():
        typer.run(rate)
