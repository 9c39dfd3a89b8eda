"""How fast `llama-mtp graft` writes, against `cp` on the same disk, and its peak memory.

    python tests/bench/figures/graft.py [--folder FOLDER] [--gigabytes 3] [--rounds 3]

Writes a trunk of random bytes and a head of 5 % of it, then in turn copies a file of the joined
size with `cp` and grafts, each brought to the disk; both read from memory, then both from the disk.
Needs about four times the size in FOLDER, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))
import models

from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import metadata_of
from llama_mtp.gguf.types import BLOCKS
from llama_mtp.gguf.write import TensorSource, stored, write_gguf
from llama_mtp.heads.split import strip

_Q8_0 = 8
_ROW, _ROWS = 4096, 16384  # a matrix of 71 MB


def random_matrix(name: str, kind: int) -> TensorSource:
    elements, size = BLOCKS[kind]
    n_bytes = _ROW // elements * size * _ROWS

    def chunks() -> Iterator[bytes]:
        for at in range(0, n_bytes, 2**23):
            yield os.urandom(min(2**23, n_bytes - at))

    return TensorSource(name, (_ROW, _ROWS), kind, n_bytes, chunks)


def zero_matrix(name: str) -> TensorSource:
    """In F32, so that re-quantising has something to read."""
    n_bytes = 4 * _ROW * _ROWS
    zeros = bytes(2**23)
    return TensorSource(name, (_ROW, _ROWS), 0, n_bytes, lambda: iter([zeros] * (n_bytes // 2**23)))


def build(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """Write trunk and head, and return them; neither is more than bytes of the right form."""
    small = read_header(models.build(folder / "small.gguf", "hy_v3").path)
    tensors = [stored(small, tensor) for tensor in small.tensors.values()]
    each = BLOCKS[_Q8_0][1] * _ROW // 32 * _ROWS
    n_head = max(1, round(gigabytes * 1e9 * 0.05 / each))
    tensors += [random_matrix(f"blk.2.big{i}.weight", _Q8_0) for i in range(n_head)]
    head = folder / "head.gguf"
    write_gguf(head, metadata_of(small), tensors)
    trunk = strip(head, folder / "small-trunk.gguf")
    header = read_header(trunk)
    tensors = [stored(header, tensor) for tensor in header.tensors.values()]
    n_trunk = round(gigabytes * 1e9 / each)
    tensors += [random_matrix(f"blk.1.big{i}.weight", _Q8_0) for i in range(n_trunk)]
    write_gguf(folder / "trunk.gguf", metadata_of(header), tensors)
    return folder / "trunk.gguf", head


def run(*command: str) -> tuple[float, float]:
    """Run a command; return seconds and its peak memory in MB."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1000


def to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def page_cache(paths: tuple[Path, ...], *, keep: bool) -> None:
    """Put files into the page cache, or out of it."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            if keep:
                while file.read(2**23):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    graft = [sys.executable, "-c", "from llama_mtp.commands.main import main; main()", "graft"]
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        trunk, head = build(folder, options.gigabytes)
        whole, out = folder / "whole.gguf", folder / "out.gguf"
        run(*graft, str(trunk), str(head), "-o", str(whole))
        size = whole.stat().st_size
        print(f"joined file: {size / 1e9:.2f} GB, head {head.stat().st_size / 1e9:.2f} GB")
        for keep in (True, False):
            speeds: dict[str, list[float]] = {"cp": [], "graft": []}
            peak = 0.0
            for _ in range(options.rounds):
                for name in speeds:
                    out.unlink(missing_ok=True)
                    os.sync()
                    page_cache((trunk, head) if name == "graft" else (whole,), keep=keep)
                    start = time.perf_counter()
                    if name == "cp":
                        run("cp", str(whole), str(out))
                        to_disk(out)
                    else:
                        peak = max(peak, run(*graft, str(trunk), str(head), "-o", str(out))[1])
                    speeds[name].append(size / 1e6 / (time.perf_counter() - start))
            cp, ours = median(speeds["cp"]), median(speeds["graft"])
            print(
                f"inputs {'in memory' if keep else 'on disk'}: cp {cp:.0f} MB/s, graft {ours:.0f} "
                f"MB/s, {ours / cp:.0%} (pairs "
                + ", ".join(
                    f"{b / a:.0%}" for a, b in zip(speeds["cp"], speeds["graft"], strict=True)
                )
                + f"), peak memory {peak:.0f} MB"
            )
        out.unlink()
        whole.unlink()
        trunk.unlink()
        small = read_header(folder / "small.gguf")
        tensors = [stored(small, tensor) for tensor in small.tensors.values()]
        tensors += [zero_matrix(f"blk.2.big{i}.weight") for i in range(4)]
        write_gguf(head, metadata_of(small), tensors)
        arguments = (str(folder / "small-trunk.gguf"), str(head), "-o", str(out), "--type", "Q4_K")
        seconds, peak = run(*graft, *arguments)
        speed = head.stat().st_size / 1e6 / seconds
        print(f"head of 1.07 GB in F32 stored as Q4_K: {speed:.0f} MB/s, peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
