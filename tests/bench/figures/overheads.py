"""Print what the package itself takes: imports, the check of a file, a round, a build.

    python tests/bench/figures/overheads.py

Overheads come from a constructed model whose decodes cost next to nothing, one thread, constant
depth 3: what is left is ours. Times are medians.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))
import models
from models import large
from rich.console import Console
from rich.table import Table

from llama_mtp import Llama
from llama_mtp.heads.check import check_head

IMPORT = """
import time, llama_cpp
t = time.perf_counter()
import llama_mtp
a = time.perf_counter()
llama_mtp.Llama
print(a - t, time.perf_counter() - a)
"""


def imports() -> tuple[float, float]:
    """Return seconds of ``import llama_mtp`` and of the first use of ``Llama``, after llama_cpp."""
    runs = [
        [float(x) for x in subprocess.check_output([sys.executable, "-c", IMPORT]).split()]
        for _ in range(5)
    ]
    return median(r[0] for r in runs), median(r[1] for r in runs)


def header_check(path: Path) -> float:
    """Return seconds that the check of a GGUF at every load takes."""
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        assert check_head(path).executable
        runs.append(time.perf_counter() - start)
    return median(runs)


def inspect(path: Path, *options: str) -> tuple[float, float]:
    """Return seconds that the command ``llama-mtp inspect`` takes, and processor seconds."""
    command = str(Path(sysconfig.get_path("scripts"), "llama-mtp"))
    wall, work = [], []
    for _ in range(5):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([command, "inspect", str(path), *options], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        work.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return median(wall), median(work)


def overhead(folder: Path, arch: str) -> tuple[float, float, float]:
    """Return microseconds a round in native code and in Python, and tokens a round."""
    m = models.build(folder / f"{arch}.gguf", arch)
    native, python = [], []
    with Llama(
        str(m.path),
        spec_type="draft-mtp",
        spec_adaptive=False,
        n_ctx=1024,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    ) as llm:
        for seed in range(9):
            for _ in islice(llm.generate(m.text(20, seed), temp=0.0), 300):
                pass
            stats = llm.spec_stats.last
            assert stats is not None
            native.append(stats.native_overhead_ns / stats.num_rounds / 1e3)
            python.append(stats.python_ns / stats.num_rounds / 1e3)
        return median(native), median(python), llm.spec_stats.mean_acceptance_length


def native_build(folder: Path) -> float:
    """Return seconds that `pip wheel` takes, build tools fetched and native module compiled."""
    source = Path(__file__).resolve().parents[3]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)],
        check=True,
    )
    return time.perf_counter() - start


def main() -> None:
    table = Table("figure", "measured", "goal")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package, first_use = imports()
        table.add_row("import llama_mtp, after llama_cpp", f"{package * 1e3:.1f} ms", "50 ms")
        table.add_row("first use of llama_mtp.Llama", f"{first_use * 1e3:.1f} ms", "")
        big = large.write(folder / "large.gguf", models.build(folder / "small.gguf", "qwen35"))
        table.add_row("header check, 248,320 tokens", f"{header_check(big) * 1e3:.0f} ms", "100 ms")
        for options, goal in (("--no-probe",), "300 ms"), ((), ""):
            wall, work = inspect(big, *options)
            table.add_row(
                f"llama-mtp inspect {' '.join(options)}".rstrip() + " of it",
                f"{wall * 1e3:.0f} ms ({work * 1e3:.0f} ms of processor)",
                goal,
            )
        for arch in models.ARCHITECTURES:
            native, python, tokens = overhead(folder, arch)
            table.add_row(
                f"a round on {arch} ({tokens:.2f} tokens): native", f"{native:.1f} us", "30 us"
            )
            table.add_row("  in Python", f"{python:.1f} us", "60 us")
        table.add_row("wheel, isolated build", f"{native_build(folder):.0f} s", "60 s")
    Console().print(table)


if __name__ == "__main__":
    main()
