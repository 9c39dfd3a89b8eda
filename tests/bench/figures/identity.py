"""Print how many tokens were compared with stock, and how many parted: long texts, F16 cache.

    python tests/bench/figures/identity.py [TOKENS]

Each architecture writes nine texts of 2,100 tokens at constant depth 3, greedy and sampled, with
the host's default cache. Where a text parts from stock, the two-part check of
``measure.identity`` judges.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import models
from rich.console import Console
from rich.table import Table

from llama_mtp import Llama
from llama_mtp.measure.identity import check_identity


def compare(folder: Path, arch: str, n_tokens: int) -> tuple[int, int, int]:
    """Return tokens compared with stock, partings, illegal ones; the host's default cache, F16."""
    m = models.build(folder / f"{arch}-state.gguf", arch, state_scale=1.0)
    options = {"n_ctx": n_tokens + 204, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    tokens = partings = illegal = 0
    with (
        Llama(str(m.path), spec_type="draft-mtp", spec_adaptive=False, **options) as ours,
        Llama(str(m.path), spec_type="none", **options) as stock,
    ):
        for seed in range(3):
            for sampling in ({"temp": 0.0}, {"temp": 0.9}, {"temp": 1.0, "top_k": 0, "min_p": 0.0}):
                report = check_identity(
                    stock, ours, m.text(40, seed), n_tokens, seed + 1, 4, quiet=True, **sampling
                )
                tokens += report.n_tokens
                partings += len(report.divergences)
                illegal += len(report.illegal)
    return tokens, partings, illegal


def main() -> None:
    n_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 2100
    table = Table("architecture", "tokens", "partings", "illegal")
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for arch in models.ARCHITECTURES:
            counts = compare(Path(folder), arch, n_tokens)
            table.add_row(arch, *map(str, counts))
            total += counts[2]
    Console().print(table)
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
