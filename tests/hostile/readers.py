"""The readers under attack, each run on one path in a process of its own.

Read paths from standard input, one a line, and answer each with one line of JSON: the outcome,
the processor seconds, and the peak of resident memory in MB.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS, MEGABYTES = 1.0, 200.0

Reader = Callable[[Path], object]


def header(path: Path) -> object:
    from llama_mtp.gguf.header import read_header

    return read_header(path)


def inspect(path: Path) -> object:
    from llama_mtp.heads.check import check_head

    return check_head(path)


def report(path: Path) -> object:
    from llama_mtp.measure.inspect import inspect_file

    return inspect_file(path, probe=False).to_dict()


def graft(path: Path) -> object:
    """Join, and take apart, the files ``base.gguf`` and ``head.gguf`` of a folder."""
    from llama_mtp.errors import LlamaMtpError
    from llama_mtp.heads import graft, split

    base, head, out = (path / f"{name}.gguf" for name in ("base", "head", "out"))
    with contextlib.suppress(LlamaMtpError):
        split.split(head, force=True)
    with contextlib.suppress(LlamaMtpError):
        split.strip(base, force=True)
    return graft.graft(base, head, out, force=True)


def safetensors(path: Path) -> object:
    """Read every tensor that a folder's index or its only shard names."""
    from llama_mtp.heads.hf.safetensors import DTYPES, Checkpoint

    checkpoint = Checkpoint(path)
    tensors = [checkpoint.tensor(name) for name in ("a", "b", "c") if name in checkpoint]
    return [tensor.read() for tensor in tensors if tensor.dtype in DTYPES]


READERS: dict[str, Reader] = {
    "header": header,
    "inspect": inspect,
    "shards": inspect,
    "report": report,
    "graft": graft,
    "safetensors": safetensors,
}
# Processor seconds and MB; tools that write may take longer and hold pieces of a file.
LIMITS: dict[str, tuple[float, float]] = {"graft": (5.0, 1000.0)}


def limits(target: str) -> tuple[float, float]:
    return LIMITS.get(target, (SECONDS, MEGABYTES))


def peak_memory() -> float:
    """MB of resident memory at most since `forget_peak`, or since the start."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def attempt(reader: Reader, path: Path) -> dict[str, object]:
    """Run a reader; ``outcome`` is ``read``, ``refused``, or what must never happen."""
    from llama_mtp.errors import LlamaMtpError

    forget_peak()
    start = time.process_time()
    try:
        reader(path)
        outcome, message = "read", ""
    except LlamaMtpError as error:
        outcome, message = "refused", str(error)
        try:
            message.encode()
        except UnicodeEncodeError:
            outcome = "message that cannot be printed"
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"
        message = str(error)[:300]
    return {
        "outcome": outcome,
        "message": message,
        "seconds": time.process_time() - start,
        "megabytes": peak_memory(),
    }


def main() -> None:
    reader = READERS[sys.argv[1]]
    attempt(reader, Path("absent"))  # imports what it needs
    # An address space that grows past this ends in MemoryError, before the machine suffers.
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = int(2 * limits(sys.argv[1])[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (now + room,) * 2)
    for line in sys.stdin:
        print(json.dumps(attempt(reader, Path(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
